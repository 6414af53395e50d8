"""Whether llama.cpp may rearrange a file's weights here."""

from __future__ import annotations

from pathlib import Path

from kvbits.models.gguf import GgufFile

FLAG = "--no-repack"
REASON = f"`{FLAG}`: llama.cpp's programs crash on K-quant weights that they rearrange for AMX."


def repack_flags(gguf: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """:data:`FLAG` for a file with K-quants on a machine with AMX, where llama.cpp crashes without it."""
    amx = cpuinfo.is_file() and "amx_tile" in cpuinfo.read_text()
    return [FLAG] if amx and any(t.kind.name.endswith("_K") for t in GgufFile(gguf).tensors.values()) else []
