"""The Confusion Bank: which classes a model mixes up, and on which images."""

from capt.bank.confusion_bank import ConfusionBank, ConfusionStatistics

__all__ = ["ConfusionBank", "ConfusionStatistics"]
