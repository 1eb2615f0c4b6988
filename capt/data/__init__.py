"""Labelled images from every common layout, in a fixed order, with ids that stay.

``load`` opens a data set, ``load_compositional`` one whose images show (state, object) pairs, ``load_multi_label`` one
whose images have any number of labels; ``few_shot``, ``base_novel`` and ``long_tail`` choose from it, ``batches`` feeds
it to a model. ``PositionGrid`` makes pictures that differ only in where an object is.
"""

from __future__ import annotations

from capt.data.batches import Batch, Batches, batches
from capt.data.check import CheckReport, check
from capt.data.compositional import CompositionalSet
from capt.data.cutouts import Cutouts, drawn_shapes, emoji_cutouts, read_cutouts
from capt.data.few_shot import base_novel, few_shot, hold_out, load_few_shot, save_few_shot
from capt.data.image_set import DataSet, ImageSet
from capt.data.loading import load, load_compositional, load_multi_label
from capt.data.long_tail import long_tail
from capt.data.multi_label import MultiLabelImages, MultiLabelSet
from capt.data.pair_texts import PairTexts, load_pair_texts, save_pair_texts, validate_pair_texts
from capt.data.position_grid import PositionGrid

__all__ = [
    "Batch",
    "Batches",
    "CheckReport",
    "CompositionalSet",
    "Cutouts",
    "DataSet",
    "ImageSet",
    "MultiLabelImages",
    "MultiLabelSet",
    "PairTexts",
    "PositionGrid",
    "base_novel",
    "batches",
    "check",
    "drawn_shapes",
    "emoji_cutouts",
    "few_shot",
    "hold_out",
    "load",
    "load_compositional",
    "load_few_shot",
    "load_multi_label",
    "load_pair_texts",
    "long_tail",
    "read_cutouts",
    "save_few_shot",
    "save_pair_texts",
    "validate_pair_texts",
]
