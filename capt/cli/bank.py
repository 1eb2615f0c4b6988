"""``capt bank build`` and ``capt bank search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from capt.cli.common import (
    Data,
    DataOptions,
    Model,
    ModelOptions,
    Spec,
    check_out,
    open_image,
    print_json,
    print_rows,
)
from capt.errors import CaptError, DataError

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.bank import ConfusionBank


def build(
    data: Spec,
    /,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    shots: int | None = None,
    seed: int = 1,
    all_classes: bool = False,
    batch_size: int = 32,
    top: int = 10,
    out: Path = Path("runs/bank"),
    json: bool = False,
) -> int:
    """Collect the training images that a CLIP model gets wrong, grouped by confusion pair.

    Args:
        data: data set; only its training split is read.
        model: which CLIP model is used.
        where: where the data set lies.
        shots: use this many images a class; default: the whole training split.
        seed: seed of the few-shot choice.
        all_classes: use every class; default: the base classes (the first half), as CAPT does.
        batch_size: images in a forward pass.
        top: confusion pairs printed.
        out: folder of the bank.
        json: print the pairs as JSON.
    """
    from capt.bank import ConfusionBank
    from capt.data import base_novel, few_shot

    check_out(out)
    data_set = where.open(data)
    if not all_classes:
        data_set, _ = base_novel(data_set)
    images = data_set.train if shots is None else few_shot(data_set.train, shots, seed)
    held_out = [split for split in (data_set.val, data_set.test) if split is not None]
    forbidden = (int(sample_id) for split in held_out for sample_id in split.ids)
    bank = ConfusionBank.build(model.open(), images, batch_size=batch_size, forbidden_ids=forbidden)
    bank.save(out)
    if not json:
        print(f"{len(bank)} of {len(images)} images are misclassified, in {len(bank.cell_keys)} pairs: {out}")
    _print_pairs(bank, top, json)
    return 0


def search(
    bank: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_BANK")],
    /,
    image: Path | None = None,
    pair: tuple[str, str] | None = None,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    seed: int | None = None,
    top: int = 10,
    json: bool = False,
) -> int:
    """What a bank holds: its most frequent pairs, the images of one pair, or the mistakes most like an image.

    Args:
        bank: folder of a bank or of a run.
        image: an image; stored mistakes are ranked by similarity to it.
        pair: true class and predicted class; list the images of that mistake.
        model: which CLIP model encodes the image; must be the one the bank was built with.
        seed: which seed's bank of a run; default: the lowest.
        top: entries printed.
        json: print JSON.
    """
    found = open_bank(bank, seed)
    if image is not None and pair is not None:
        raise CaptError("give --image or --pair, not both")
    if image is None and pair is None:
        _print_pairs(found, top, json)
        return 0
    if pair is not None:
        rows, similarities = _rows_of_pair(found, *pair)[:top], None
    else:
        assert image is not None
        rows, similarities = _nearest_rows(found, model.open(), image, top)
    records = [
        {
            "image": found.names[row],
            "id": int(found.sample_ids[row]),
            "true": found.class_names[int(found.labels[row])],
            "predicted": found.class_names[int(found.predictions[row])],
            "confidence": round(float(found.confidences[row]), 4),
            **({} if similarities is None else {"similarity": round(similarities[i], 4)}),
        }
        for i, row in enumerate(rows)
    ]
    if json:
        print_json(records)
    elif records:
        print_rows(list(records[0]), [list(record.values()) for record in records])
    else:
        print("the bank holds no such image")
    return 0


def _print_pairs(bank: ConfusionBank, top: int, json: bool) -> None:
    pairs = bank.top_pairs(top)
    if json:
        print_json([{"true": true, "predicted": predicted, "count": count} for true, predicted, count in pairs])
    elif pairs:
        print_rows(["true", "predicted", "count"], [list(pair) for pair in pairs])
    else:
        print("the bank is empty: the model made no mistake on these images")


def open_bank(folder: Path, seed: int | None = None) -> ConfusionBank:
    """The bank in the folder of a bank, or of a run: that of ``seed``, by default the lowest."""
    from capt.bank import ConfusionBank
    from capt.report.content import seed_folder

    if not folder.is_dir():
        raise DataError(f"'{folder}': no such folder; expected a bank or a run")
    return ConfusionBank.load(folder if (folder / "bank.json").is_file() else seed_folder(folder, seed) / "bank")


def _rows_of_pair(bank: ConfusionBank, true: str, predicted: str) -> list[int]:
    ids = []
    for name in (true, predicted):
        if name not in bank.class_names:
            raise DataError(f"the bank has no class {name!r}; 'capt bank search' without --pair lists its pairs")
        ids.append(bank.class_names.index(name))
    rows = ((bank.labels == ids[0]) & (bank.predictions == ids[1])).nonzero().squeeze(1).tolist()
    return [int(row) for row in rows]


def _nearest_rows(bank: ConfusionBank, backbone: Backbone, image: Path, top: int) -> tuple[list[int], list[float]]:
    import torch
    from torch.nn.functional import normalize

    from capt.ops import bank_topk

    if bank.backbone and bank.backbone != backbone.fingerprint():
        raise CaptError("the bank was built with another model (fingerprints differ): give its --model, --pretrained")
    pixels = backbone.preprocess(open_image(image)).unsqueeze(0).to(backbone.logit_scale.device)
    with torch.inference_mode():
        query = normalize(backbone.image_features(pixels), dim=-1)
        scores, rows = bank_topk(query.float().cpu(), bank.features, k=top)
    found = [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]
    return [row for row, _ in found], [score for _, score in found]
