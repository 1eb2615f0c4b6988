"""What the documentation shows is what the code does: generated parts, links, the example."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from capt import cli
from capt.report import read_summary
from tests.test_report_compositional import write_example

ROOT = Path(__file__).resolve().parent.parent


def test_generated_parts_and_links_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/docs.py", "--check"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_lines_in_the_readme_are_ten() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("<!-- drop-in -->\n```python\n")[1].split("\n```")[0]
    assert len(code.splitlines()) == 10
    assert code.replace("\n", "\n    ") in (ROOT / "examples" / "drop_in.py").read_text(encoding="utf-8")


def test_the_lines_in_the_readme_run() -> None:
    from capt.backbones import import_torchvision

    import_torchvision()  # where torchvision's binary does not fit torch, open_clip could not be imported otherwise
    before, after = script("examples/drop_in.py").main(n_classes=10, epochs=10)
    assert 0 < before <= 1 and after >= before


def test_the_lines_in_the_guide_to_msci_run() -> None:
    page = (ROOT / "docs" / "msci.md").read_text(encoding="utf-8")
    code = page.split("<!-- msci-lines -->\n```python\n")[1].split("\n```")[0]
    assert len(code.splitlines()) == 10
    found = script("examples/compositional.py").main(n_images=12, epochs=1)
    assert 0 <= found["auc"] <= found["best_seen"] <= 1


def test_the_lines_in_the_guide_to_cprfl_run() -> None:
    page = (ROOT / "docs" / "cprfl.md").read_text(encoding="utf-8")
    code = page.split("<!-- cprfl-lines -->\n```python\n")[1].split("\n```")[0]
    assert len(code.splitlines()) == 10
    assert 0 < script("examples/multi_label.py").main(n_images=12, epochs=1) <= 1


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/msci.md", "docs/cprfl.md"])
def test_commands_that_are_shown_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", "")  # commands that go on in the next line
    commands = [line.split("#")[0] for line in text.splitlines() if line.startswith("capt ")]
    for command in commands:
        verb, rest = cli.find_verb(shlex.split(command)[1:])
        with pytest.raises(SystemExit):
            cli.main([*verb.split(), "--help"])
        shown = capsys.readouterr().out
        for option in (word for word in rest if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", shown), f"{command}: {option}"


def test_targets_that_are_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)", readme + makefile)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def script(path: str) -> ModuleType:
    """A file that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def docs_script() -> ModuleType:
    return script("scripts/docs.py")


def test_benchmark_tables_come_from_the_recorded_results(tmp_path: Path) -> None:
    docs = docs_script()
    goal = {"rivals": ["torch"], "goal": 2.0, "best": "torch", "ratio": 4.0, "met": True}
    row = {"file": "bank", "op": "bank_topk", "shape": "N 10", "dtype": "bfloat16", "direction": "forward",
           "ms": 1.0, "ms_p20": 0.9, "ms_p80": 1.1, "rivals_ms": {"torch": 4.0}, "ratios": {"torch": 4.0},
           "goals": [goal]}  # fmt: skip
    other = {**row, "op": "bank_ranges"}
    machine = {"commit": "abc123", "cpu": "a CPU", "cpus": 2, "threads": 2, "torch": "2", "date": "2026-01-01"}
    recorded = {"machine": machine, "rows": [row, other]}
    page = "a\n<!-- benchmark: bank -->\nold\n<!-- end -->\nb\n<!-- benchmark: bank_ranges -->\n<!-- end -->\n"
    (tmp_path / "bank_gpu.md").write_text("", encoding="utf-8")
    text = docs.benchmark_tables(page, tmp_path, {"bank", "bank_ranges"}, recorded)
    first, second = text.split("\nb\n")
    assert "old" not in text and text.startswith("a\n<!-- benchmark: bank -->\nMeasured: commit abc123; a CPU")
    assert "| N 10 | bfloat16 | forward | 1.00 |" in first and "4.00 (torch)" in first and "`bank_topk`" not in first
    assert "[bank_gpu.md](bank_gpu.md)" in first and "bank_gpu" not in second
    assert text == docs.benchmark_tables(text, tmp_path, {"bank", "bank_ranges"}, recorded)
    together = docs.benchmark_tables(page.split("b\n")[0], tmp_path, {"bank"}, recorded)
    assert "`bank_topk`:" in together and "`bank_ranges`:" in together
    assert "Not measured yet." in docs.benchmark_tables(
        "<!-- benchmark: x -->\n<!-- end -->", tmp_path, {"x"}, recorded
    )
    summary = docs.benchmark_summary(recorded)
    assert "| bank_topk | forward | N 10 | bfloat16 | torch | 4.00 | 4.00 | 2 | yes |" in summary


def test_every_op_that_was_measured_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = docs_script()
    monkeypatch.setattr(docs, "KERNELS", tmp_path)
    with pytest.raises(SystemExit, match=r"no page has a mark .* for .*grid_adapter"):
        docs.kernel_pages()


def test_tables_of_compositional_runs_judge_msci(tmp_path: Path) -> None:
    docs, summary = docs_script(), read_summary(write_example(tmp_path))
    text = docs.compositional_tables({"vit, all of it": summary, "vit, csp alone": without(summary, "msci")})
    assert text.count("| **Zero-shot** | mean |") == 2 and text.startswith("vit, all of it:\n\n| Method |")
    assert text.splitlines()[-1] == (
        "- vit, all of it: MSCI is above Zero-shot and CSP in Closed HM, Closed AUC, Open HM, Open AUC."
    )
    summary["methods"]["csp"]["mean"] = {**summary["methods"]["msci"]["mean"], "closed_auc": 0.5, "closed_best_hm": 0}
    assert docs.compositional_tables({"vit, x": summary}).splitlines()[-1] == (
        "- vit, x: MSCI is not above CSP in Closed AUC (25.0 against 50.0), CSP in Open HM (50.0 against 50.0), "
        "CSP in Open AUC (25.0 against 25.0)."
    )
    table = docs.first_table({"vit, x": summary})
    assert "vit, x:\n\n- Closed world, best harmonic mean" in table and "MSCI does not beat CSP in closed AUC" in table


def without(summary: dict[str, Any], method: str) -> dict[str, Any]:
    return {**summary, "methods": {name: found for name, found in summary["methods"].items() if name != method}}
