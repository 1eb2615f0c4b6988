"""The operations on the hot paths: one public function each, dispatched by a visible plan.

Every op takes ``backend=None`` (the plan chooses) or "reference", "cpu", "cuda", "triton"; a forced backend that cannot
run raises CaptError. ``explain(op, ...)`` shows the decision without running anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from capt.errors import CaptError
from capt.ops import asymmetric_loss as _asymmetric_loss
from capt.ops import attention_readout as _attention_readout
from capt.ops import bank_topk as _bank_topk
from capt.ops import confusion_pairs as _confusion_pairs
from capt.ops import expert_gating as _expert_gating
from capt.ops import grid_adapter as _grid_adapter
from capt.ops import pair_frontier as _pair_frontier
from capt.ops import prompt_attention as _prompt_attention
from capt.ops import prompt_attention_shared as _prompt_attention_shared
from capt.ops._plan import BACKENDS, Plan

_PLANS: dict[str, Callable[..., Plan]] = {
    "grid_adapter": _grid_adapter.plan,
    "bank_topk": _bank_topk.plan,
    "confusion_pairs": _confusion_pairs.plan,
    "prompt_attention": _prompt_attention.plan,
    "prompt_attention_shared": _prompt_attention_shared.plan,
    "expert_gating": _expert_gating.plan,
    "asymmetric_loss": _asymmetric_loss.plan,
    "pair_frontier": _pair_frontier.plan,
    "attention_readout": _attention_readout.plan,
}


def explain(op: str, **shapes: Any) -> Plan:
    """Which backend a call would take, and why.

    op: a name of ``__all__``. shapes: what the op's plan depends on (see the docstring of ``plan`` in its module);
    every op accepts backend=, dtype= (a torch.dtype) and device=, and

    - grid_adapter: batch, grid (height, width), dim, n_prefix
    - bank_topk: n_queries, n_rows, dim, k, candidates
    - confusion_pairs: batch, n_classes, k
    - prompt_attention: batch, k, rows (commonality, difference), dim
    - prompt_attention_shared: batch, rows (commonality, difference), n_keys, dim
    - expert_gating: tokens, dim, hidden, n_experts, top_k
    - asymmetric_loss: batch, n_classes, reduction
    - pair_frontier: batch, n_pairs, n_groups, n_states, n_objects (0: no primitive term)
    - attention_readout: batch, length, n_heads, head_dim, n_groups, n_biases

    Raises CaptError for an unknown op, arguments that do not fit, or a forced backend that cannot run.

    >>> print(explain("confusion_pairs", batch=8, n_classes=10, k=2, dtype=torch.float64).backend)
    reference
    """
    if op not in _PLANS:
        raise CaptError(f"explain: there is no op '{op}'; known are {', '.join(_PLANS)}")
    if not isinstance(shapes.get("dtype", torch.float32), torch.dtype):
        raise CaptError(f"explain('{op}', ...): dtype must be a torch.dtype, found {shapes['dtype']!r}")
    if "device" in shapes:
        try:
            torch.device(shapes["device"])
        except (RuntimeError, TypeError) as error:
            raise CaptError(f"explain('{op}', ...): device={shapes['device']!r} is no device of torch") from error
    try:
        return _PLANS[op](**shapes)
    except (TypeError, IndexError) as error:
        raise CaptError(f"explain('{op}', ...): {error}") from error


# The functions replace the submodules of the same name as attributes of this package.
grid_adapter = _grid_adapter.grid_adapter
bank_topk = _bank_topk.bank_topk
confusion_pairs = _confusion_pairs.confusion_pairs
prompt_attention = _prompt_attention.prompt_attention
prompt_attention_shared = _prompt_attention_shared.prompt_attention_shared
expert_gating = _expert_gating.expert_gating
asymmetric_loss = _asymmetric_loss.asymmetric_loss
pair_frontier = _pair_frontier.pair_frontier
attention_readout = _attention_readout.attention_readout
AttentionReadout = _attention_readout.AttentionReadout
PairFrontier = _pair_frontier.PairFrontier

__all__ = [
    "BACKENDS",
    "AttentionReadout",
    "PairFrontier",
    "Plan",
    "asymmetric_loss",
    "attention_readout",
    "bank_topk",
    "confusion_pairs",
    "expert_gating",
    "explain",
    "grid_adapter",
    "pair_frontier",
    "prompt_attention",
    "prompt_attention_shared",
]
