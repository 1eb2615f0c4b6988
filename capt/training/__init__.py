"""Training: the loop, cached tokens and the run record."""

from capt.training.loop import TrainingOptions, train
from capt.training.token_store import TokenStore

__all__ = ["TokenStore", "TrainingOptions", "train"]
