"""The machine that a report was made on, without its name or its paths."""

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory and the libraries that the figures depend on."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{total_memory() / 2**30:.0f} GiB",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def device_name() -> str:
    """The device that torch makes tensors on: "cpu", or a GPU by its product's name."""
    device = torch.get_default_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def total_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that are available now."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return total_memory() // 2


def resident_bytes(pid: int) -> int:
    """Bytes of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
