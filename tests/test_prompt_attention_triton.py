"""The Triton kernels of prompt attention, executed by Triton's interpreter in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.native_build import ROOT

pytest.importorskip("triton", reason="triton is not installed: pip install 'capt[triton]'")


@pytest.mark.parametrize("op", ["prompt_attention", "prompt_attention_shared"])
def test_interpreted_problems(op):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.triton_interpreted_prompt_attention", op, "500"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["500 problems"]
