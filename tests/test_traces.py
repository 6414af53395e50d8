"""One reader of production traces, for the planner and for replays."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbits.errors import ConfigError
from kvbits.replay import trace as replay
from kvbits.traces import Arrival, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = (
    '{"timestamp": 3000, "input_length": 513, "output_length": 7, "hash_ids": [4, 9]}\n\n'
    '{"timestamp": 1500, "input_length": 5, "output_length": 0, "hash_ids": [1]}\n'
)


@pytest.fixture
def new_york() -> Iterator[None]:
    """Local time with a gap at 02:00 on 12 March 2023."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "America/New_York"
    time.tzset()
    yield
    del os.environ["TZ"]
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def both(path: Path) -> list[Arrival]:
    """What the planner reads, after a look that a replay reads the same."""
    found = read_trace(path)
    replayed = replay.read_trace(path)
    assert [(r.arrival, r.prompt_tokens, r.output_tokens, r.blocks) for r in replayed] == [
        (a.time, a.prompt, max(1, a.answer), a.blocks) for a in found
    ]
    return found


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_as_editors_leave_them(tmp_path: Path, ends: str, mark: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes((mark + MOONCAKE.replace("\n", ends)).encode())
    assert both(path) == [Arrival(0.0, 5, 0, (1,)), Arrival(1.5, 513, 7, (4, 9))]
    rows = "2023-11-16 18:15:46.6805900,374,44\n\n2023-11-16 18:15:50.9951690,396,109\n"
    path.write_bytes((mark + AZURE + rows).replace("\n", ends).encode())
    first, second = both(path)
    assert (first.time, first.prompt, first.answer, first.blocks) == (0.0, 374, 44, ())
    assert second.time == pytest.approx(4.314579, abs=1e-6)


@pytest.mark.usefixtures("new_york")
def test_times_have_no_daylight_saving(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE + "2023-03-12 01:59:59.5,1,1\n2023-03-12 03:00:00,2,1\n")
    assert [a.time for a in both(path)] == [0.0, 3600.5]


def test_times_with_zones(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        AZURE + "2024-05-10 00:00:00.250000+00:00,1,1\n2024-05-10T02:00:01+02:00,2,1\n"
        "2024-05-10T00:00:02Z,3,1\n2024-05-10 00:00:03.25,4,1\n"
    )
    assert [a.time for a in both(path)] == pytest.approx([0.0, 0.75, 1.75, 3.0])


def test_columns_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text('GeneratedTokens, "model",ContextTokens,TIMESTAMP\n9,x,5,2023-11-16 18:15:46\n')
    assert both(path) == [Arrival(0.0, 5, 9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"input_length": 1}\n', "line 1 of the trace .* KeyError: 'output_length'"),
        (MOONCAKE + "{\n", "line 4 of the trace"),
        (MOONCAKE + "[1]\n", "line 4 of the trace"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}\n', "line 1 .* 0 prompt and 1 answer"),
        ('{"timestamp": 1, "input_length": "many", "output_length": 1}\n', "line 1 .*many"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', "line 1 .* the time is nan"),
        ('{"timestamp": 1, "input_length": Infinity, "output_length": 1}\n', "line 1 .* OverflowError"),
        ('{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "line 1 .* 1 hash_ids cannot"),
        ('{"timestamp": 1, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}', "line 1 .* 2 hash_ids"),
        (AZURE, "holds no requests"),
        (AZURE + "yesterday,1,1\n", "line 2 of the trace .*'yesterday' is no time"),
        (AZURE + "2023-11-16 18:15:46,1,1\n2023-11-16 25:15:46,1,1\n", "line 3 of the trace"),
        (AZURE + "2023-11-16 18:15:46,x,1\n", "line 2 of the trace"),
        (AZURE + "2023-11-16 18:15:46,1\n", "line 2 of the trace .* KeyError: 'GeneratedTokens'"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    for read in (read_trace, replay.read_trace):
        with pytest.raises(ConfigError, match=message):
            read(path)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", '{"prompt": "x"}', "[" * 5000, '"x'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd"
    path.write_text(text)
    with pytest.raises(ConfigError, match="odd' is no trace"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "missing")


def test_rows_are_read_as_json_has_them(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(json.dumps({"timestamp": 5, "input_length": 3, "output_length": 2, "note": "a\u2028b"}))
    assert both(path) == [Arrival(0.0, 3, 2)]
