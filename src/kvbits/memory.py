"""What the machine has left, so that a size that cannot be had is refused before anything slow is done. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import psutil

from kvbits.errors import ConfigError

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True)
class Room:
    """``free`` bytes, and in words what bounds them."""

    free: int
    reason: str


def host_room(root: Path = Path("/")) -> Room:
    """Memory that this process can still get: the machine's, or its control group's where that is less.

    Both versions of Linux' control groups are read (kernel documentation, admin-guide/cgroup-v1/memory and
    admin-guide/cgroup-v2), every group from the process's own up; the page cache that a group can drop is free.
    ``root`` is where ``proc`` and ``sys`` lie.
    """
    memory = psutil.virtual_memory()
    rooms = [Room(memory.available, f"{show(memory.available)} of {show(memory.total)} are available")]
    for limit, used in _groups(root):
        free = max(limit - used, 0)
        rooms.append(Room(free, f"the control group's limit is {show(limit)}, of which {show(free)} are left"))
    return min(rooms, key=lambda room: room.free)


def check_host(sizes: dict[str, int]) -> None:
    """Raise ``ConfigError`` when the machine has not enough memory for all ``sizes``, bytes by option."""
    room = host_room()
    total = sum(sizes.values())
    if total > room.free:
        asked = " and ".join(f"{name} of {show(size)}" for name, size in sizes.items())
        raise ConfigError(f"there is no memory for {asked}: {room.reason}; give less")


def check_disk(option: str, size: int, path: Path) -> None:
    """Raise ``ConfigError`` when the disk of ``path``, a file or a directory, has less than ``size`` bytes left."""
    free = shutil.disk_usage(path).free
    if size > free:
        left = f"{show(free)} are free; give less"
        raise ConfigError(f"there is no room for {option} of {show(size)} in '{path}': {left}")


def show(size: int) -> str:
    """``size`` bytes in the largest unit that fits, for people."""
    for unit, name in _UNITS:
        if size >= unit:
            # A decimal: a size may be too large for a float.
            number = Decimal(size) / unit
            return f"{number:.3g} {name}" if number >= 1_000_000 else f"{number:,.4g} {name}"
    return f"{size} bytes"


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group that holds this process and has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            files = ("memory.max", "memory.current", "inactive_file")
            base = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        # In a container the group's own name may not be there: its files lie at the mount's root then.
        group = base / name.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(base):
                break
            try:
                limit = int((folder / files[0]).read_text())
                used = int((folder / files[1]).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # no such group, or no limit ("max")
            yield limit, used - int(stat.get(files[2], 0))
