"""Facts about the machine that belong beside every measured figure.

python benchmarks/machine.py
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

_FLAGS = ("avx2", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_ARM_FLAGS = ("asimd", "asimddp", "i8mm", "bf16", "sve")


def machine_facts() -> dict[str, Any]:
    """CPU, memory and software of this machine; plain values, ready for JSON."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "family_model_stepping": "/".join(cpu.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "architecture": platform.machine(),
        "flags": [flag for flag in _FLAGS + _ARM_FLAGS if flag in flags],
        "caches": _caches(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(psutil.Process().cpu_affinity() or ()),
        "memory_bytes": psutil.virtual_memory().total,
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "hypervisor": "hypervisor" in flags,
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def describe(facts: dict[str, Any]) -> str:
    """One line for tables."""
    memory = facts["memory_bytes"] / 2**30
    return (
        f"{facts['cpu']} (family/model/stepping {facts['family_model_stepping']}), {facts['usable_cpus']} CPUs, "
        f"{memory:.0f} GiB, {' '.join(facts['flags'])}; {facts['system']}, Python {facts['python']}, "
        f"torch {facts['torch']} with {facts['torch_threads']} threads, load {facts['load_average']:.2f}"
    )


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _caches() -> dict[str, str]:
    """Size of each cache that the first processor uses, by level and kind, for example ``{"L2 Unified": "1024K"}``."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        caches[f"L{level} {kind}"] = size or "?"
    return caches


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


if __name__ == "__main__":
    print(json.dumps(machine_facts(), indent=2))
