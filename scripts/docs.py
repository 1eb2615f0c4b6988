"""Fills the generated parts of README.md and docs/results.md, and checks every relative link in the documentation.

    python scripts/docs.py            rewrite them
    python scripts/docs.py --check    change nothing, fail if something is out of date or broken

Between ``<!-- demo-table -->`` and ``<!-- /demo-table -->`` stands the result of ``capt demo`` as recorded in
docs/results/demo.json (its summary.json); between the ``drop-in`` marks, the marked lines of examples/drop_in.py;
between the ``tuning-table`` marks of docs/results.md, what scripts/tune_demo.py wrote.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

from capt.report import markdown_table, verdict

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs" / "results" / "demo.json"
TUNING = ROOT / "docs" / "results" / "tuning.json"
EXAMPLE = ROOT / "examples" / "drop_in.py"


def demo_table() -> str:
    """Means of every method, and what they say."""
    summary = json.loads(DEMO.read_text(encoding="utf-8"))
    sentences = "\n".join(f"- {sentence}" for sentence in verdict(summary))
    return f"{markdown_table(summary, seeds=False)}\n\n{sentences}"


def drop_in() -> str:
    """The lines of the example between its marks."""
    code = EXAMPLE.read_text(encoding="utf-8").split("# --- ten lines ---\n")[1].split("    # --- end ---")[0]
    return f"```python\n{textwrap.dedent(code).rstrip()}\n```"


def tuning_table() -> str:
    """Accuracies of every setting, over the held-out styles."""
    rows = json.loads(TUNING.read_text(encoding="utf-8"))["mean_over_held_out_styles"]
    metrics = list(next(iter(rows.values())))
    lines = ["| Setting | " + " | ".join(metrics) + " |", "| --- |" + " ---: |" * len(metrics)]
    lines += [f"| {name} | " + " | ".join(f"{100 * row[m]:.1f}" for m in metrics) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def generated() -> dict[str, dict[str, str]]:
    """Generated parts by page and mark; what was never recorded stays as it is."""
    pages = {"README.md": {"drop-in": drop_in()}, "docs/results.md": {}}
    if DEMO.is_file():
        pages["README.md"]["demo-table"] = demo_table()
    if TUNING.is_file():
        pages["docs/results.md"]["tuning-table"] = tuning_table()
    return pages


def filled(page: str, text: str, parts: dict[str, str]) -> str:
    """``text`` of a page with its generated parts renewed."""
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        if count != 1:
            sys.exit(f"{page}: expected the marks <!-- {name} --> and <!-- /{name} --> once, found {count}")
    return text


def broken_links() -> list[str]:
    """Relative links in README.md and docs/ whose target does not exist."""
    broken = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        without_code = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
            if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.split("#")[0]).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    return broken


def main() -> None:
    """Entry point."""
    for page, parts in generated().items():
        old = (ROOT / page).read_text(encoding="utf-8")
        new = filled(page, old, parts)
        if "--check" in sys.argv[1:]:
            if new != old:
                sys.exit(f"{page} is out of date: run 'make docs'")
        elif new != old:
            (ROOT / page).write_text(new, encoding="utf-8")
            print(f"{page} renewed")
    if links := broken_links():
        sys.exit("broken links:\n" + "\n".join(links))


if __name__ == "__main__":
    main()
