"""A size that the machine has not got is refused by its option's name, before a model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers.serving import byte_model, engine_of

from kvbits import memory
from kvbits.cli.main import _status
from kvbits.config import parse_bytes
from kvbits.errors import ConfigError
from kvbits.llm import LLM

TOO_MUCH = psutil.virtual_memory().total * 3


@pytest.mark.parametrize("size", [str(TOO_MUCH), "9999TiB", str(10**30), "9" * 400])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "no-such-model", "--prompt", "x"],
        ["serve", "no-such-model"],
        ["chat", "no-such-model"],
        ["demo", "no-such-model", "--output", "out"],
        ["cache", "load", "no-such-model", "a-file"],
    ],
)
def test_commands_refuse_before_the_model_is_looked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    size: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    assert _status([*command, "--kv-cache-memory", size]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "there is no memory for" in line
    assert "kv" in line
    assert "cache" in line
    assert "available" in line or "control group" in line


def test_the_library_refuses_before_the_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no memory for kv_cache_memory of [\d,.]+ [TG]iB: "):
        LLM("no-such-model", kv_cache_memory=TOO_MUCH)
    with pytest.raises(ConfigError, match=r"kv_cache_memory of 1 MiB and kv_offload_size of [\d,.]+ [TG]iB"):
        LLM("no-such-model", kv_cache_memory="1MiB", kv_offload_size=TOO_MUCH)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"no room for kv_offload_size of 6 MiB in '.*': 5 MiB are free"):
            LLM("no-such-model", kv_offload_size="6MiB", kv_offload_path=str(path))
    # what an earlier run left behind is written over, so it counts as free
    (tmp_path / "left").write_bytes(bytes(2 << 20))
    with pytest.raises(ConfigError, match="no-such-model"):
        LLM("no-such-model", kv_offload_size="6MiB", kv_offload_path=str(tmp_path / "left"))


def test_an_engine_on_a_loaded_model_refuses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = byte_model()
    for size in (TOO_MUCH, 10**30):
        with pytest.raises(ConfigError, match="no memory for kv_cache_memory of"):
            engine_of(loaded, kv_cache_memory=size)
        with pytest.raises(ConfigError, match="no memory for kv_offload_size of"):
            engine_of(loaded, kv_offload_size=size)
    with pytest.raises(ConfigError, match="no room for kv_offload_size of"):
        engine_of(loaded, kv_offload_size=10**18, kv_offload_path=str(tmp_path))
    # more than there seems to be, and yet the system says no
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 62, total=1 << 62))
    monkeypatch.setattr(memory, "_groups", lambda root: [])
    with pytest.raises(ConfigError, match=r"the system refuses a KV cache of 1.05e\+6 TiB"):
        engine_of(loaded, kv_cache_memory=1 << 60)


def test_limits_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 << 30, total=24 << 30))
    assert memory.host_room(tmp_path) == memory.Room(20 << 30, "20 GiB of 24 GiB are available")

    def group(folder: str, names: tuple[str, str, str], limit: object, used: int, cache: int) -> None:
        place = tmp_path / "sys/fs/cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / names[0]).write_text(f"{limit}\n")
        (place / names[1]).write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    v2 = ("memory.max", "memory.current", "inactive_file")
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/job\n")
    group("pod/job", v2, "max", 1 << 30, 0)
    group("pod", v2, 8 << 30, 3 << 30, 1 << 30)
    room = memory.host_room(tmp_path)
    assert (room.free, room.reason) == (6 << 30, "the control group's limit is 8 GiB, of which 6 GiB are left")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/docker/abc\n3:cpuset:/\n")
    group("memory", v1, 2 << 30, 512 << 20, 0)  # a container sees its own group as the root
    assert memory.host_room(tmp_path).free == 1536 << 20


def test_sizes() -> None:
    assert [memory.show(n) for n in (5, 1 << 20, 3 << 29, 10**30)] == ["5 bytes", "1 MiB", "1.5 GiB", "9.09e+17 TiB"]
    assert parse_bytes("0.3GB") == 300_000_000
    assert parse_bytes("9007199254740993") == 9007199254740993  # no detour over a float
