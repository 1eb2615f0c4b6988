"""Which stamps become cut-outs: photographs with a transparent ground and a short name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capt.data.cutouts import read_cutouts

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    import build_cutouts

    yield build_cutouts
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def stamp(folder: Path, name: str, caption: str | None, *, flat=False, opaque=False, side=120) -> None:
    random = np.random.default_rng(len(name))
    pixels = np.zeros((side, side, 4), np.uint8)
    inner = slice(None) if opaque else slice(side // 8, -side // 8)
    pixels[inner, inner, :3] = 90 if flat else random.integers(0, 256, pixels[inner, inner, :3].shape)
    pixels[inner, inner, 3] = 255
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(f"{caption}\nde.utf8=Etwas.\n")


def test_photographs_with_a_name_and_a_ground_are_taken_and_nothing_else(script, tmp_path):
    stamps, out = tmp_path / "stamps", tmp_path / "out"
    stamp(stamps, "tiger", "A tiger.")
    stamp(stamps / "more", "tiger2", "The Tiger!")
    stamp(stamps, "clown", "A clown fish.")
    stamp(stamps, "drawing", "A house.", flat=True)
    stamp(stamps, "opaque", "A wall.", opaque=True)
    stamp(stamps, "tiny", "An ant.", side=40)
    stamp(stamps, "long", "This is a picture of a very long train.")
    stamp(stamps, "nameless", None)
    assert script.build(stamps, out) == {"clown fish": 1, "tiger": 2}
    cutouts = read_cutouts(out)
    assert cutouts.names == ("clown fish", "tiger") and [len(one) for one in cutouts.pictures] == [1, 2]
    assert cutouts.pictures[0][0].shape == (90, 90, 4)
    assert "tiger/1.png\ttiger.png" in (tmp_path / "out.tsv").read_text()


def test_a_folder_without_photographs_is_refused(script, tmp_path):
    stamp(tmp_path, "drawing", "A house.", flat=True)
    with pytest.raises(SystemExit, match="no photograph of an object"):
        script.build(tmp_path, tmp_path / "out")
