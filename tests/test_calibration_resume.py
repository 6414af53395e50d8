"""An interrupted calibration goes on where it was, and says whose parts it finds."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import complaint, status
from helpers.tiny import save, tiny_model, tiny_tokenizer

from kvbits.calibration import fit as fitting
from kvbits.calibration import run as whole
from kvbits.calibration.collect import collect
from kvbits.calibration.fit import fit
from kvbits.calibration.layerwise import Layers
from kvbits.calibration.parts import Parts
from kvbits.calibration.run import Goal, Sizes, calibrate
from kvbits.cli.session import Bar
from kvbits.codecs.policy_file import load_policy
from kvbits.errors import ConfigError
from kvbits.evaluation.selftext import write_windows
from kvbits.models import LoadedModel
from kvbits.models.load import wrap

SIZES = Sizes(context=256, windows=3, check_windows=2)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return wrap(tiny_model("llama", head_dim=32), tiny_tokenizer(), "tiny")


def text_of(seed: int = 5, words: int = 1500) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(4, 97) for _ in range(words)]


def calibrated(loaded: LoadedModel, output: Path, **changes: Any) -> str:
    given = {"goal": Goal(bits=6.5), "sink": "int8", "sizes": SIZES, "bar": Bar, "note": print} | changes
    texts = given.pop("texts", [("words.txt", text_of())])
    policy, _ = calibrate(loaded, texts, output, **given)
    return policy.name


class Interrupted(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, count: int) -> list[int]:
    """The ``count``-th call of a function raises; returns a list that grows with each."""
    own, calls = getattr(owner, name), list[int]()

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == count:
            raise Interrupted
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


STAGES: dict[str, tuple[object, str, int, int]] = {
    # whose function it is, the call that fails, calls in all
    "gradients": (Layers, "gradients", 2, 3),
    "fitting": (fitting, "_row", 4, 6),
    "checking": (whole.SideBySide, "run", 2, 2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_finished_is_not_done_again(
    loaded: LoadedModel, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrated(loaded, tmp_path / "straight")
    owner, name, broken, total = STAGES[stage]
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, broken)
        with pytest.raises(Interrupted):
            calibrated(loaded, tmp_path / "broken")
    assert (tmp_path / "broken" / "unfinished" / "run.json").exists()
    assert not (tmp_path / "broken" / "policy.json").exists()
    with monkeypatch.context() as patch:
        calls = stop_at(patch, owner, name, 99)
        # the same bytes: labels are drawn as if nothing had happened
        assert calibrated(loaded, tmp_path / "broken") == expected
    assert len(calls) == total - (broken - 1)
    assert not (tmp_path / "broken" / "unfinished").exists()


def test_another_goal_goes_on_from_the_same_parts(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, whole.SideBySide, "run", 1)
        with pytest.raises(Interrupted):
            calibrated(loaded, tmp_path)
    calls = stop_at(monkeypatch, Layers, "gradients", 99)
    got = calibrated(loaded, tmp_path, goal=Goal(bits=5.0), sink=None)
    assert not calls
    assert got == calibrated(loaded, tmp_path / "b", goal=Goal(bits=5.0), sink=None)


def test_a_killed_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tiny_model("llama", head_dim=32), tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(f"w{w}" for w in text_of(words=6000)))
    options = ("--text", tmp_path / "words.txt", "--bits", 6, "--context", 512, "--windows", 8, "--check-windows", 1)
    command = ["calibrate", model, "-o", tmp_path / "out", *options]
    code = "import sys; from kvbits.cli.main import run; run(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stderr=subprocess.DEVNULL)
    first, second = (tmp_path / "out" / "unfinished" / f"window-{i}.safetensors" for i in (0, 1))
    try:
        deadline = time.monotonic() + 300
        while not second.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "policy.json").exists()
    seen: list[int] = []
    own = Parts.remove

    def remove(parts: Parts) -> None:
        seen.append(first.stat().st_mtime_ns)
        own(parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "remove", remove)
        assert status(*command) == 0
    assert seen == [written]
    assert "going on with" in capsys.readouterr().err
    assert status("calibrate", model, "-o", tmp_path / "straight", *options) == 0
    names = {json.loads((tmp_path / d / "policy.json").read_text())["tensors"]["sha256"] for d in ("out", "straight")}
    assert len(names) == 1
    assert not (tmp_path / "out" / "unfinished").exists()


def test_ctrl_c_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = save(tiny_model("llama", head_dim=32), tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(f"w{w}" for w in text_of()))
    monkeypatch.setattr(Layers, "gradients", interrupted)
    small = ("--context", 256, "--windows", 2, "--check-windows", 1)
    options = ("--text", tmp_path / "words.txt", "--bits", 6, "-o", tmp_path / "out", *small)
    assert status("calibrate", model, *options) == 130
    assert f"is kept in '{tmp_path / 'out' / 'unfinished'}'; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"texts": [("words.txt", text_of(6))]}, "texts {'words.txt': "),
        ({"sizes": Sizes(256, 2, 2)}, "windows 3 and not 2"),
        ({"sizes": Sizes(192, 3, 2)}, "context 256 and not 192"),
    ],
)
def test_parts_of_another_calibration_are_refused(
    loaded: LoadedModel, changes: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, Layers, "gradients", 2)
        with pytest.raises(Interrupted):
            calibrated(loaded, tmp_path)
    with pytest.raises(ConfigError, match="holds parts of another calibration") as caught:
        calibrated(loaded, tmp_path, **changes)
    assert named in str(caught.value)
    other = wrap(tiny_model("llama", seed=1, head_dim=32), tiny_tokenizer(), "tiny")
    with pytest.raises(ConfigError, match=f"model 'tiny .{loaded.fingerprint}.' and not 'tiny .{other.fingerprint}"):
        calibrated(other, tmp_path)
    assert (tmp_path / "unfinished" / "window-0.safetensors").exists()
    (tmp_path / "unfinished" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run.json' is damaged"):
        calibrated(loaded, tmp_path)


def test_files_of_somebody_else_s_are_left_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "novel.txt").write_text("Call me")
    with pytest.raises(ConfigError, match="is not empty and no unfinished calibration"):
        calibrated(loaded, tmp_path)
    assert (tmp_path / "unfinished" / "novel.txt").exists()


def test_two_at_once_do_not_share_a_directory(loaded: LoadedModel, tmp_path: Path) -> None:
    def second(line: str) -> None:
        with pytest.raises(ConfigError, match="another calibration is at work in"):
            calibrated(loaded, tmp_path / "out")
        told.append(line)

    told: list[str] = []
    (tmp_path / "out" / "unfinished").mkdir(parents=True)
    # what a kill leaves of the directory's first file
    (tmp_path / "out" / "unfinished" / ".run.7.part.json").write_text("{")
    calibrated(loaded, tmp_path / "out", goal=Goal(max_kl=1.0), note=second)
    assert told
    assert not (tmp_path / "out" / "unfinished").exists()


def test_what_a_run_is_of_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ConfigError, match=r"run\.json.* No space left"):
            Parts(tmp_path, {"model": "a"})
    Parts(tmp_path, {"model": "b"})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["bits", "max_kl"])
def test_goals_are_positive_numbers(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}; it must be positive"):
        Goal(**{name: value})


def test_a_damaged_part_is_done_again(loaded: LoadedModel, tmp_path: Path) -> None:
    windows = [text_of(i, 256) for i in range(2)]
    parts = Parts(tmp_path / "parts", {})
    expected = collect(loaded, windows, parts=parts)
    rows = expected.samples[3].rows.clone()
    path = tmp_path / "parts" / "window-1.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "parts" / "fit-0.safetensors").write_bytes(b"")
    again = collect(loaded, windows, parts=Parts(tmp_path / "parts", {}))
    assert torch.equal(again.samples[3].rows, rows)
    table = fit(again, ["int4", "int3"], parts=parts)
    for one, two in zip(table[0], fit(again, ["int4", "int3"], parts=parts)[0], strict=True):
        assert (one.name, one.bytes, one.cost) == (two.name, two.bytes, two.cost)
        for a, b in zip(vars(one.rounding).values(), vars(two.rounding).values(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", {})
    (tmp_path / "parts" / "window-0.part").mkdir()  # where the file would go
    with pytest.raises(ConfigError, match=r"cannot keep a finished part in '.*window-0"):
        parts.put("window-0", {"x": torch.zeros(3)})
    with pytest.raises(ConfigError, match="cannot keep finished parts in"):
        Parts(tmp_path / "parts" / "run.json" / "deeper", {})


def test_the_model_s_own_text_is_continued(loaded: LoadedModel) -> None:
    kept: list[list[list[int]]] = []
    keep: Callable[[list[list[int]]], None] = lambda windows: kept.append([list(w) for w in windows])  # noqa: E731
    straight = write_windows(loaded, 400, 2, keep=keep)
    assert [len(kept[0][0]), len(kept[-1][0])] == [257, 400]
    assert kept[-1] == straight
    continued = write_windows(loaded, 400, 2, begun=kept[0])
    assert [window[:257] for window in continued] == kept[0]
    assert [len(w) for w in continued] == [400, 400]
    assert write_windows(loaded, 400, 2, begun=straight) == straight


def test_the_policy_that_is_left_is_whole(loaded: LoadedModel, tmp_path: Path) -> None:
    name = calibrated(loaded, tmp_path)
    assert load_policy(tmp_path, loaded.geometry, loaded.fingerprint).name == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy.json", "rounding.safetensors"]


def test_what_cannot_be_done_is_told_before_the_work(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stop_at(monkeypatch, Layers, "gradients", 1)
    for sizes, said in (
        ((256, 5, 2), "windows of 256"),
        ((128, 2, 2), "too short"),
        ((1024, 1, 1), "over the 512 tokens"),
    ):
        with pytest.raises(ConfigError, match=said):
            calibrated(loaded, tmp_path / "new", sizes=Sizes(*sizes))
    assert not calls
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert "cannot make the directory" in complaint(capsys, "calibrate", "none", "--bits", 5, "-o", tmp_path / "file")
    assert "cannot write to the directory '/proc'" in complaint(capsys, "calibrate", "none", "--bits", 5, "-o", "/proc")


def test_a_model_of_one_layer(tmp_path: Path) -> None:
    one = wrap(tiny_model("qwen2", num_hidden_layers=1, head_dim=32), tiny_tokenizer(), "one")
    name = calibrated(one, tmp_path)
    found = load_policy(tmp_path, one.geometry, one.fingerprint)
    assert found.name == name
    assert found.bits_per_element(one.geometry) <= 6.5
