"""The shipped ViT tower: whole files, its form, the shipped model's text side, fitted off the evaluation classes."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from capt.backbones import Backbone, EvalTransform, load, wrap
from capt.backbones.embedded import embedded_folder, embedded_vit_folder, load_vit
from capt.errors import DamagedFileError, DataError
from capt.files import load_tensors, read_json, sha256
from tests.test_embedded_model import EMOJI, INDEX, class_names, quoted_rows, words

VIT = embedded_vit_folder()
WEIGHTS = VIT / "capt-vit.safetensors"
MANIFEST = read_json(VIT / "fit_manifest.json")
TESTED = "emoji, all 307 classes, test styles"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load("embedded-vit")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VIT, tmp_path / "vit"))


# --- files -------------------------------------------------------------------------------------------


def test_checksums_name_every_file_and_match() -> None:
    recorded = read_json(VIT / "checksums.json")
    assert set(recorded) == {path.name for path in VIT.iterdir()} - {"checksums.json"}
    for name, entry in recorded.items():
        assert ((VIT / name).stat().st_size, sha256(VIT / name)) == (entry["bytes"], entry["sha256"]), name


def test_the_folder_is_small_and_holds_no_text_tower() -> None:
    assert sum(path.stat().st_size for path in VIT.iterdir()) <= 24_000_000
    assert all(name.startswith("visual.") for name in load_tensors(WEIGHTS) if name != "logit_scale")
    assert "text_cfg" not in read_json(VIT / "open_clip_config.json")["model_cfg"]


def test_a_damaged_file_is_refused(copied: Path) -> None:
    file = copied / WEIGHTS.name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"capt-vit\.safetensors"):
        load_vit(copied)


def test_missing_weights_are_named(copied: Path) -> None:
    (copied / WEIGHTS.name).unlink()
    with pytest.raises(DataError, match=r"capt-vit\.safetensors"):
        load_vit(copied)


# --- form --------------------------------------------------------------------------------------------


def test_blocks_grid_and_preprocessing(backbone: Backbone) -> None:
    tower = backbone.tower
    config = read_json(VIT / "open_clip_config.json")
    vision, values = config["model_cfg"]["vision_cfg"], config["preprocess_cfg"]
    side = vision["image_size"]
    assert backbone.name == "embedded-vit" and backbone.dim == 512 and tower.activation == "gelu"
    assert len(tower.blocks) == vision["layers"] == MANIFEST["layers"]
    assert tower.grid == (side // vision["patch_size"],) * 2 and tower.n_prefix == 1
    assert backbone.preprocess == EvalTransform((side, side), tuple(values["mean"]), tuple(values["std"]))


@torch.no_grad()
def test_the_feature_is_read_off_the_class_token(backbone: Backbone) -> None:
    images = torch.randn(2, 3, *backbone.tower.image_hw, generator=torch.Generator().manual_seed(0))
    tokens = backbone.tower.run(images)
    feature = backbone.tower.project(tokens)
    assert torch.equal(feature, backbone.image_features(images))
    patches = tokens.clone()
    patches[:, 1:] = 0
    assert torch.equal(backbone.tower.project(patches), feature)
    assert not torch.equal(backbone.tower.project(tokens.roll(1, dims=1)), feature)


def test_stored_matrices_are_unpacked_row_by_row(backbone: Backbone) -> None:
    stored = load_tensors(WEIGHTS)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    matrix, scale = stored[f"visual.{name}"], stored[f"visual.{name}.int8_scale"]
    assert matrix.dtype == torch.int8 and scale.shape == matrix.shape[:1]
    assert (matrix.abs().amax(1) == 127).all()  # every row uses the whole range
    assert torch.equal(dict(backbone.model.visual.named_parameters())[name], matrix.float() * scale.float()[:, None])


@torch.no_grad()
def test_texts_are_those_of_the_shipped_model(backbone: Backbone) -> None:
    first = load("embedded")
    names = ["red apple", "fire engine"]
    assert torch.equal(backbone.class_text_features(names), first.class_text_features(names))
    assert backbone.templates == first.templates == read_json(embedded_folder() / "templates.json")["templates"]
    own = load_tensors(WEIGHTS).get("logit_scale")
    expected = float(first.logit_scale) if own is None else own.float().exp().item()
    assert float(backbone.logit_scale) == pytest.approx(expected, rel=1e-4)


def test_the_fingerprint_is_stable_and_its_own(backbone: Backbone) -> None:
    again = load_vit(VIT)
    other = wrap(again.model, again.tokenizer, again.preprocess, name="embedded-vit", templates=again.templates)
    assert other.fingerprint() == backbone.fingerprint() != load("embedded").fingerprint()


# --- what it was fitted on ---------------------------------------------------------------------------


def test_no_further_drawing_of_the_fit_is_called_like_a_class() -> None:
    names = class_names()
    inside = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
    assert sum(map(len, MANIFEST["drawings"].values())) == MANIFEST["pictures"]["drawing"] > 1000
    for drawings in MANIFEST["drawings"].values():
        for name in drawings:
            assert not inside.search(words(name)), name


# --- numbers -----------------------------------------------------------------------------------------


def test_the_card_quotes_what_was_measured() -> None:
    assert quoted_rows(VIT / "MODEL_CARD.md") == read_json(VIT / "evaluation.json")["results"]


def test_it_names_unseen_drawings_about_as_often_as_was_measured(backbone: Backbone) -> None:
    measured = next(row for row in read_json(VIT / "evaluation.json")["results"] if row["test"] == TESTED)
    styles = {vendor["name"] for vendor in INDEX["vendors"] if vendor["split"] == "test"}
    entries = [entry for entry in INDEX["images"] if entry["vendor"] in styles][::6]
    entries.sort(key=lambda entry: entry["vendor"])
    pictures = []
    for style in sorted(styles):
        with tarfile.open(EMOJI / f"{style}.tar") as archive:
            for entry in (entry for entry in entries if entry["vendor"] == style):
                member = archive.extractfile(f"{entry['key']}.webp")
                assert member is not None
                pictures.append(backbone.preprocess(Image.open(io.BytesIO(member.read())).convert("RGB")))
    features = F.normalize(backbone.image_features(torch.stack(pictures)), dim=-1)
    heads = backbone.class_text_features([entry["name"] for entry in INDEX["classes"]])
    right = (features @ heads.T).argmax(1) == torch.tensor([entry["class"] for entry in entries])
    assert 100 * right.float().mean().item() >= 0.7 * measured["top1"] > 10 * 100 / len(INDEX["classes"])
