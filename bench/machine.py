"""The machine a number was measured on, and the memory of this process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from reasonrl.kernels import native

PACKAGES = ("torch", "transformers", "trl", "accelerate", "liger-kernel", "reasonrl")


def high_water() -> int:
    """Peak resident memory of this process, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts from the parent's there: it survives fork and exec
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) // 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def reset_high_water() -> None:
    """Let the peak start from what is resident now (Linux)."""
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5")


def resident() -> int:
    """Resident memory of this process now, MiB; 0 where only the peak is known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(s for s in status.read_text().splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def gpu() -> str:
    """Name, driver and clocks as the driver tells them; the name alone where it does not."""
    asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{torch.cuda.get_device_name()}, clocks unknown ({error})"
    return told.splitlines()[torch.cuda.current_device()]


def machine(device: str = "cpu") -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if "model name" in s] if info.exists() else []
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    found = {
        "cpu": names[0].split(":")[1].strip() if names else cpu,
        "cores": os.cpu_count(),
        "isa": native.core().isa() if native.available() is None else "no native code",
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if name in installed},
    }
    return found | ({"gpu": gpu()} if device != "cpu" else {})


def settle() -> None:
    """Give freed memory back, so that a peak is that of what follows."""
    gc.collect()
    if sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION"):
        ctypes.CDLL(None).malloc_trim(0)
