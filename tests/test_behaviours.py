"""Every required behaviour of a method and every leak has a test that carries its number (docs/fidelity.md)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

FILES = set(Path(__file__).parent.glob("test_*.py"))
# Files about compositional zero-shot learning; their numbers are those of MSCI's behaviours.
COMPOSITIONAL = {
    file for file in FILES
    if re.match(r"test_(msci|csp|compositional|layer_maps|training_schedule|open_world|pair_frontier)", file.name)
}  # fmt: skip


def numbered(pattern: str, files: Iterable[Path] = FILES) -> Counter[str]:
    """How often ``def test_<number>_`` occurs in some files of the test tree, by number."""
    return Counter(found for file in files for found in re.findall(pattern, file.read_text("utf-8"), re.MULTILINE))


def test_each_of_the_36_behaviours_of_capt_has_a_test():
    found = numbered(r"^ *def test_(\d\d)_\w+\(", FILES - COMPOSITIONAL)
    assert not {f"{n:02d}" for n in range(1, 37)} - found.keys()


def test_each_of_the_32_behaviours_of_msci_has_a_test():
    found = numbered(r"^ *def test_(\d\d)_\w+\(", COMPOSITIONAL)
    assert not {f"{n:02d}" for n in range(1, 33)} - found.keys()


def test_each_of_the_7_leaks_has_a_test():
    assert numbered(r"^ *def test_(L\d)_\w+\(").keys() == {f"L{n}" for n in range(1, 8)}
