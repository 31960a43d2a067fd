"""Where measurements come from: machine, device, runtime and its settings."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from sekron_search.runtimes.base import Runtime
from sekron_search.runtimes.registry import make_runtime


@dataclass(frozen=True)
class Provenance:
    """Where something was measured."""

    machine: str
    processor: str
    device: str
    runtime: str
    runtime_version: str
    num_threads: int
    memory_format: str
    torch: str
    date: str

    @classmethod
    def here(cls, runtime: Runtime | None = None) -> Provenance:
        """This machine, now, through a runtime; through PyTorch as it is if None."""
        used = make_runtime("pytorch-eager") if runtime is None else runtime
        return cls(
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            processor=processor_of(used.device),
            device=used.device.type,
            runtime=used.name,
            runtime_version=used.version(),
            num_threads=used.thread_count,
            memory_format=used.memory_format,
            torch=str(torch.__version__),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


def processor_of(device: torch.device) -> str:
    """The name of a device of this machine."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
