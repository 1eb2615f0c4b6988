"""The shipped model: whole files, readable by stock open_clip, fitted off the evaluation classes, numbers as quoted."""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from capt.backbones import import_torchvision, load
from capt.files import read_json, sha256

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "capt" / "assets" / "model"
EMOJI = ROOT / "capt" / "assets" / "emoji"
WEIGHTS = MODEL / "capt-lite2.safetensors"
MANIFEST = read_json(MODEL / "fit_manifest.json")
INDEX = read_json(EMOJI / "index.json")
TONE = r"(?:medium-light|medium-dark|light|medium|dark)-skin-tone"
PEOPLE = r"(?:man|men|woman|women|person|people|boy|girl)"


def base_key(key: str) -> str:
    """An emoji key without skin tones and genders, so that every variant of a drawing has one name."""
    key = re.sub(rf"-{TONE}\b", "", key)
    return re.sub(rf"^{PEOPLE}-|-{PEOPLE}$", "", key)


def words(text: str) -> str:
    """A name in lower case, its words between single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def class_names() -> set[str]:
    """Names and keys of the evaluation classes as words; an animal's face also under the animal's name."""
    names = {words(entry[field]) for entry in INDEX["classes"] for field in ("name", "key")}
    faces = {words(c["name"]).removesuffix(" face") for c in INDEX["classes"] if c["group"] == "animal faces"}
    return names | faces


def quoted_rows(page: Path) -> list[dict[str, Any]]:
    """The result rows of a page, in the form that evaluation.json has."""
    row = re.compile(r"^\| ([^|]+?) \| (\d+) \| (\d+) \| (\d+\.\d) \| (\d+\.\d) \|$", re.MULTILINE)
    return [
        {"test": m[1], "images": int(m[2]), "classes": int(m[3]), "top1": float(m[4]), "top5": float(m[5])}
        for m in row.finditer(page.read_text(encoding="utf-8"))
    ]


# --- files -------------------------------------------------------------------------------------------


def test_checksums_name_every_file_and_match() -> None:
    recorded = read_json(MODEL / "checksums.json")
    present = {path.name for path in MODEL.iterdir()} - {"checksums.json"}
    assert set(recorded) == present
    for name, entry in recorded.items():
        assert ((MODEL / name).stat().st_size, sha256(MODEL / name)) == (entry["bytes"], entry["sha256"]), name


def test_the_folder_is_small_enough_to_ship() -> None:
    assert WEIGHTS.stat().st_size <= 44_000_000
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 48_000_000


def test_weights_are_finite_and_in_half_precision() -> None:
    with safe_open(WEIGHTS, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - safe_open is no dict
            tensor = stored.get_tensor(name)
            assert not tensor.is_floating_point() or tensor.dtype == torch.float16, name
            assert torch.isfinite(tensor.float()).all(), name


# --- stock open_clip ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, eval transform, tokenizer) as a user of open_clip alone would get them."""
    import_torchvision()
    import open_clip

    config = read_json(MODEL / "open_clip_config.json")
    place = tmp_path_factory.mktemp("configs")
    (place / "capt-lite2.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(place)
    values = config["preprocess_cfg"]
    model, _, transform = open_clip.create_model_and_transforms(
        "capt-lite2",
        pretrained=str(WEIGHTS),
        image_mean=tuple(values["mean"]),
        image_std=tuple(values["std"]),
        image_interpolation=values["interpolation"],
        image_resize_mode=values["resize_mode"],
    )
    return model.eval(), transform, open_clip.get_tokenizer("capt-lite2")


def drawings(count: int = 3) -> list[Image.Image]:
    chosen = INDEX["images"][:: len(INDEX["images"]) // count][:count]
    found = []
    for entry in chosen:
        with tarfile.open(EMOJI / f"{entry['vendor']}.tar") as tar:
            member = tar.extractfile(f"{entry['key']}.webp")
            assert member is not None
            found.append(Image.open(io.BytesIO(member.read())).convert("RGB"))
    return found


def test_stock_open_clip_loads_it_strictly(stock: Any) -> None:
    import open_clip

    model, _, _ = stock
    assert not any(open_clip.load_checkpoint(model, str(WEIGHTS), strict=True) or ())
    with safe_open(WEIGHTS, "pt") as stored:
        assert set(stored.keys()) == set(model.state_dict())
        for name, value in model.state_dict().items():
            assert torch.equal(stored.get_tensor(name).to(value.dtype), value), name


@torch.no_grad()
def test_the_library_and_stock_open_clip_agree(stock: Any) -> None:
    model, transform, tokenizer = stock
    backbone = load("embedded")
    names = ["red apple", "fire engine", "a picture of a koala"]
    pictures = torch.stack([transform(image) for image in drawings()])
    ours = torch.stack([backbone.preprocess(image) for image in drawings()])
    assert (pictures - ours).abs().max() <= 1e-4
    v, w = F.normalize(backbone.image_features(ours), dim=-1), F.normalize(model.encode_image(pictures), dim=-1)
    assert (v - w).abs().max() <= 1e-4
    t, u = backbone.text_features(names), F.normalize(model.encode_text(tokenizer(names)), dim=-1)
    assert (t - u).abs().max() <= 1e-4
    assert backbone.templates == read_json(MODEL / "templates.json")["templates"]
    assert float(backbone.logit_scale) == pytest.approx(model.logit_scale.exp().item(), rel=1e-4)


# --- nothing of the evaluation classes in the fit ----------------------------------------------------


def test_the_manifest_left_out_the_classes_that_are_shipped() -> None:
    assert sorted(MANIFEST["evaluation_keys_left_out"]) == sorted(entry["key"] for entry in INDEX["classes"])
    assert len(MANIFEST["emoji"]) > 500 and len(MANIFEST["clip_art"]) > 1000  # the tests below look at something


def test_no_emoji_of_the_fit_is_a_class_or_a_variant_of_one() -> None:
    names = class_names()
    word_sets = {frozenset(name.split()) for name in names}
    for key in MANIFEST["emoji"]:
        assert words(key) not in names and words(base_key(key)) not in names, key
        have = set(words(key).split())
        assert not any(name <= have for name in word_sets), key


def test_no_clip_art_of_the_fit_is_called_like_a_class() -> None:
    names = class_names()
    inside = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
    for record in MANIFEST["clip_art"]:
        assert not inside.search(words(record["title"])), record
        assert not names & {words(keyword) for keyword in record["keywords"]}, record


@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("cowboy-hat-face", "cowboy-hat-face"),
        ("woman-elf-medium-dark-skin-tone", "elf"),
        ("santa-claus-light-skin-tone", "santa-claus"),
        ("merman", "merman"),
    ],
)
def test_variants_have_one_base(key: str, base: str) -> None:
    assert base_key(key) == base


# --- numbers -----------------------------------------------------------------------------------------


def test_the_card_quotes_what_was_measured() -> None:
    assert quoted_rows(MODEL / "MODEL_CARD.md") == read_json(MODEL / "evaluation.json")["results"]
    assert read_json(MODEL / "evaluation.json")["templates"] == read_json(MODEL / "templates.json")["templates"]


def test_the_documentation_quotes_what_was_measured() -> None:
    results = {entry["test"]: entry["top1"] for entry in read_json(MODEL / "evaluation.json")["results"]}
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    shipped = re.findall(r"^\| shipped checkpoint \| 0\.6 \| (\d+\.\d) \| (\d+\.\d) \|$", page, re.MULTILINE)
    assert [tuple(map(float, row)) for row in shipped] == [
        (results["emoji, 239 classes drawn with seed 0, all styles"], results["Tux Paint animals, default templates"])
    ]


def test_card_manifest_and_weights_name_one_logit_scale() -> None:
    card = (MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    quoted = re.search(r"^\| logit scale \| (\d+)", card, re.MULTILINE)
    with safe_open(WEIGHTS, "pt") as stored:
        scale = math.exp(stored.get_tensor("logit_scale").float().item())
    assert quoted is not None and float(quoted[1]) == MANIFEST["logit_scale"] == pytest.approx(scale, rel=5e-3)
