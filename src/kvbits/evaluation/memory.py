"""The process's peak memory, for one part of a run."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_rss() -> None:
    """Let the next :func:`peak_rss_bytes` see only what comes after; elsewhere than on Linux it sees the whole run."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # proc(5): resets VmHWM


def peak_rss_bytes() -> int:
    """Greatest resident set size in bytes since the last reset."""
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
