"""The Triton kernel of attention_readout, executed by Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.native_build import ROOT

pytest.importorskip("triton", reason="triton is not installed: pip install 'capt[triton]'")


def test_interpreted_kernel_matches_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.triton_interpreted_attention_readout"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    n_problems, *complaints = done.stdout.split("\n")
    assert n_problems == "500" and not any(complaints), "\n".join(complaints)
