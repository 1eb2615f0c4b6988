"""What a result was measured on; nothing that identifies the machine or its user."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import capt
from capt._build import native


def machine_card(device: str = "cpu") -> dict[str, Any]:
    """Processor, GPU if any, versions, threads and load at the time of measuring."""
    build = native()
    card: dict[str, Any] = {
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


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
