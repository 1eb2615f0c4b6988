"""Training and evaluation of methods under a protocol: what is trained on, what is tested, for every seed.

``protocol`` says which images and classes, ``seeds`` trains the models of one seed, ``run`` does all seeds, keeps the
test split locked until the evaluation, and writes the run folder.
"""

from __future__ import annotations

from capt.methods.runs.options import RunOptions
from capt.methods.runs.protocol import (
    Protocol,
    Target,
    base_to_novel,
    cross_dataset,
    domain_generalisation,
    few_shot_all,
)
from capt.methods.runs.run import Run, evaluate

__all__ = [
    "Protocol",
    "Run",
    "RunOptions",
    "Target",
    "base_to_novel",
    "cross_dataset",
    "domain_generalisation",
    "evaluate",
    "few_shot_all",
]
