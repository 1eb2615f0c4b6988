"""Training: the loop, cached tokens and the run record."""

from capt.training.loop import TrainingOptions, train
from capt.training.token_store import TokenStore
from capt.training.weight_average import WeightAverage

__all__ = ["TokenStore", "TrainingOptions", "WeightAverage", "train"]
