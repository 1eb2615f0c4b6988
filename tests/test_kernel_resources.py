"""GPU kernels compile for sm_90a here, without spills and with the recorded registers and shared memory."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from tests.kernel_resources import SHARED_LIMIT, TABLE, _parse_ptxas, _short_name, in_own_process, triton_ops

NEEDS = {
    "cuda": (shutil.which("nvcc") is not None, "nvcc is not on PATH, so the CUDA sources cannot be compiled"),
    "triton": (importlib.util.find_spec("triton") is not None, "triton is not installed: pip install 'capt[triton]'"),
}


def complaints(found: dict, recorded: dict) -> list[str]:
    """Everything about a table that fails the build."""
    problems = []
    slack = 0 if found["compiler"] == recorded["compiler"] else 16  # another compiler may colour registers differently
    if found["kernels"].keys() != recorded["kernels"].keys():
        problems.append(
            f"kernels {sorted(found['kernels'].keys() ^ recorded['kernels'].keys())} are not in both tables"
        )
    for name, usage in found["kernels"].items():
        known = recorded["kernels"].get(name, usage)
        if usage["stack"] or usage["spills"]:
            problems.append(f"{name}: {usage['stack']} bytes of stack, {usage['spills']} bytes spilled")
        if usage["registers"] > known["registers"] + slack:
            problems.append(f"{name}: {usage['registers']} registers, {known['registers']} recorded")
        if usage["shared"] > min(SHARED_LIMIT, known["shared"] + 64 * slack):
            problems.append(f"{name}: {usage['shared']} bytes of shared memory, {known['shared']} recorded")
        if lost := set(known.get("instructions", [])) - set(usage.get("instructions", [])):
            problems.append(f"{name}: no {', '.join(sorted(lost))} instruction any more")
    return problems


@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_resources_are_as_recorded(kind):
    possible, reason = NEEDS[kind]
    if not possible:
        pytest.skip(reason)
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))[kind]
    assert complaints(in_own_process(kind), recorded) == [], "if intended: python -m tests.kernel_resources --write"


def test_every_dtype_and_width_is_recorded():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {name.split()[0] for name in table["triton"]["kernels"]} == set(triton_ops())
    for kind, name, expected in (("cuda", "grid_", 12), ("triton", "grid_adapter ", 9)):
        assert sum(kernel.startswith(name) for kernel in table[kind]["kernels"]) == expected


def test_spills_growth_and_lost_kernels_are_complaints():
    good = {"registers": 32, "stack": 0, "spills": 0, "shared": 0, "instructions": ["HGMMA"]}
    recorded = {"compiler": "nvcc 13.0", "kernels": {"a": good, "b": good}}
    assert complaints(recorded, recorded) == []
    for change, message in (
        ({"spills": 8}, "spilled"),
        ({"stack": 16}, "stack"),
        ({"registers": 33}, "registers"),
        ({"shared": SHARED_LIMIT + 1}, "shared memory"),
        ({"instructions": ["HMMA"]}, "no HGMMA instruction"),
    ):
        found = {"compiler": "nvcc 13.0", "kernels": {"a": {**good, **change}, "b": good}}
        assert any(message in problem for problem in complaints(found, recorded))
    assert "not in both" in complaints({"compiler": "nvcc 13.0", "kernels": {"a": good}}, recorded)[0]


def test_the_reader_of_compiler_output_sees_spills():
    log = (
        "ptxas info    : Compiling entry function '_Z1kIfLi4EEvi' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1kIfLi4EEvi\n"
        "    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 128 bytes cmem[0]\n"
    )
    usage = {"registers": 40, "stack": 8, "spills": 16, "shared": 4096}
    assert _parse_ptxas(log) == {"_Z1kIfLi4EEvi": usage}


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("void (anonymous namespace)::k<float, (int)4>(Arguments)", "k<float, 4>"),
        ("void _INTERNAL_1::k<(bool)1>((anonymous namespace)::Arguments)", "k<1>"),
        ("(anonymous namespace)::plain(int, float*)", "plain"),
        ("_Zunreadable", "_Zunreadable"),
    ],
)
def test_names_of_kernels_lose_what_depends_on_the_file(full, short):
    assert _short_name(full) == short
