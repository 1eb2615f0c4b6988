"""Every required behaviour of CAPT and every leak has a test that carries its number (docs/fidelity.md)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path


def numbered(pattern: str) -> Counter[str]:
    """How often ``def test_<number>_`` occurs in the test tree, by number."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    return Counter(found for file in files for found in re.findall(pattern, file.read_text("utf-8"), re.MULTILINE))


def test_each_of_the_36_behaviours_has_a_test():
    found = numbered(r"^ *def test_(\d\d)_\w+\(")
    assert not {f"{n:02d}" for n in range(1, 37)} - found.keys()


def test_each_of_the_7_leaks_has_a_test():
    assert numbered(r"^ *def test_(L\d)_\w+\(").keys() == {f"L{n}" for n in range(1, 8)}
