"""What the benchmark ran on, and how much it may use."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _ops


def facts() -> dict[str, Any]:
    """The machine and the versions, for JSON."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": _ops.isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory": memory()[0],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatmtl": __version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory in all, and available now; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    numbers = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return numbers.get("MemTotal"), numbers.get("MemAvailable")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
