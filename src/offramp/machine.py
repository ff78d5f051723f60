"""The machine that a measured time depends on: its processor, cores and versions; and how it keeps freed memory."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads this file, and must not wait for torch
    import torch

M_MMAP_THRESHOLD, LARGE = -3, 1 << 18
CGROUP = ("memory.max", "memory.current", "memory.stat")  # what a container says about its memory


def spare_memory() -> None:
    """From now on, give large blocks of memory back to the system as soon as they are freed.

    glibc would keep them, and the gaps between them, for the next blocks. Training needs those; decoding needs few. Does
    nothing with another C library.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGE)


def machine() -> dict[str, Any]:
    """Processor, cores, threads, date and versions, to be kept beside a measured time."""
    import torch
    import transformers

    from offramp import __version__

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": str(date.today()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "offramp": __version__,
    }


def peak_memory() -> int:
    """The most bytes of memory that this process has had; 0 where the system does not say, as on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    with suppress(OSError, StopIteration):  # on Linux, `ru_maxrss` counts what the program had that started this one, too
        status = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else 1024 * most  # macOS counts bytes, and others KiB


def free_memory(device: torch.device) -> int:
    """The bytes of memory that are free on a device; for the processor, within the limit of its container, too."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # the file has the word "max" where there is no limit
        most, used, parts = (Path("/sys/fs/cgroup", name).read_text("utf-8") for name in CGROUP)
        files = dict(line.split() for line in parts.splitlines())["inactive_file"]
        free = min(free, int(most) - int(used) + int(files))
    return max(0, free)


def processor() -> str:
    """The processor's name, as the system gives it."""
    names = [line.split(":", 1)[1].strip() for line in _processor_lines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor_words() -> set[str]:
    """The processor's maker and features, as the system lists them; empty where it lists none."""
    prefixes = ("vendor_id", "flags", "Features")
    return {word for line in _processor_lines() if line.startswith(prefixes) for word in line.split(":", 1)[1].split()}


def _processor_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return []
