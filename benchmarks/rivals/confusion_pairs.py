"""What one would write without the op: softmax, statistics of the predicted class, product, torch.topk.

Each rival takes (logits, k, statistics) and returns (pseudo, index, score). Statistics are prepared once, in the form
the rival likes best. torch.topk leaves the order of ties open, which costs nothing and which the rivals may use.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(logits: Tensor, k: int, boost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """boost [C, C]: 1 + n_i / sum n of each predicted class, one row gathered an image."""
    probability = logits.softmax(1)
    pseudo = probability.argmax(1)
    score = probability * boost[pseudo]
    score.scatter_(1, pseudo[:, None], -1.0)
    best = score.topk(k, dim=1)
    return pseudo, best.indices, best.values


def sparse(logits: Tensor, k: int, statistics: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """statistics (offsets, classes, boost of each entry): only the scores that the statistics name are touched."""
    offsets, classes, boost = statistics
    probability = logits.softmax(1)
    pseudo = probability.argmax(1)
    start = offsets[pseudo]
    length = offsets[pseudo + 1] - start
    image = torch.repeat_interleave(length)
    entry = torch.arange(len(image), device=logits.device) + (start - length.cumsum(0) + length)[image]
    place = image * logits.shape[1] + classes[entry]
    flat = probability.view(-1)
    flat.index_copy_(0, place, flat[place] * boost[entry])
    probability.scatter_(1, pseudo[:, None], -1.0)
    best = probability.topk(k, dim=1)
    return pseudo, best.indices, best.values


RIVALS = {"dense": dense, "sparse": sparse}
