"""What a result was measured on; nothing that identifies the machine or its user."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import capt
from capt._build import native

ROOT = Path(__file__).resolve().parent.parent


def machine_card(device: str = "cpu") -> dict[str, Any]:
    """Processor, GPU if any, versions, threads and load at the time of measuring."""
    build = native()
    commit, changed = source_commit()
    card: dict[str, Any] = {
        "commit": commit,
        "changed": changed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capt": capt.__version__,
        "native": {"loaded": build.loaded, "reason": build.reason, "cuda": build.cuda, "cpu_level": build.cpu_level},
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return card


def source_commit(root: Path = ROOT) -> tuple[str | None, bool]:
    """Commit of the source tree and whether tracked code differs from it; (None, False) outside a git checkout."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None, False

    def ask(*arguments: str) -> str:
        done = subprocess.run([git, *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = ask("rev-parse", "--short=12", "HEAD")
    # Results and pages made from them do not change what was measured.
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
    return (commit or None), bool(changed)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
