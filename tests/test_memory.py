"""A run stays within the memory it announced, for as many classes as ImageNet has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("base", ["zero-shot", "coop"])
def test_1000_classes_stay_within_the_announced_memory(base, tmp_path):
    command = [sys.executable, "-m", "tests.memory_run", "1000", base, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    announced, measured = map(int, done.stdout.split())
    assert measured <= announced, f"announced {announced >> 20} MiB, took {measured >> 20} MiB"
    # An announcement that is far too high would be as useless as none.
    assert announced < 1 << 30
