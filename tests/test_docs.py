"""What the documentation shows is what the code does: generated parts, links, the example."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from capt import cli

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
    spec = importlib.util.spec_from_file_location("drop_in", ROOT / "examples" / "drop_in.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(n_classes=10, epochs=10)
    assert 0 < before <= 1 and after >= before


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_commands_that_are_shown_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
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
