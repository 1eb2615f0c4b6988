"""The Triton kernels, executed by Triton's interpreter in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.native_build import ROOT

pytest.importorskip("triton", reason="triton is not installed: pip install 'capt[triton]'")


def test_interpreted_kernels_match_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.triton_interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    errors = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert len(errors) == 18  # 6 variants on one shape, 1 on each of the others, 6 sums, 1 edge case
    for name, error in errors.items():
        assert float(error) <= (2e-3 if "float16" in name and "adapter" in name else 1e-5), name
