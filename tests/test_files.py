"""Files are whole or not there: a full disk leaves what was there, names the file, and no rest of a file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvbits.errors import ConfigError
from kvbits.files import replacing, write_bytes, write_text

FULL = """
import resource, signal, sys
from pathlib import Path
from kvbits.errors import ConfigError
from kvbits.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), bytes(5000))
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_that_does_not_fit(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "results.json"
    if old is not None:
        path.write_bytes(old)
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"cannot write '{path}': File too large\n"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if old is None else {path.name: old})


def test_a_new_file_has_the_mode_of_any_new_file_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "pages.safetensors"
    plain.touch()
    with replacing(path) as place:
        assert place.suffix == ".safetensors"
        place.unlink()
        place.touch(0o600)  # as some libraries do it
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o640)
    write_bytes(path, b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o640)


def test_links_and_what_is_no_file(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    write_text(pipe, "through")
    assert reader.communicate(timeout=30)[0] == "through"
    with pytest.raises(ConfigError, match=r"cannot write '.*none/x': No such file"):
        write_text(tmp_path / "none" / "x", "")


def test_work_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_text("old")
    with pytest.raises(OverflowError), replacing(path) as place:
        (place.write_text("half"), bytes(1 << 80))
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
    assert path.read_text() == "old"
