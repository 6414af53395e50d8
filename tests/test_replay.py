"""Traces, prompts made for them, what a cache could find, and ``kvbits bench-serve`` against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.serving import MODEL, Running, engine_of, running
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.cli.main import run
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.replay.ideal import allowed_hits
from kvbits.replay.prompts import BlockText
from kvbits.replay.report import parse_goals, summary
from kvbits.replay.run import LoadShape, Outcome, arrivals, replay
from kvbits.replay.send import Record
from kvbits.replay.target import find_target
from kvbits.replay.trace import TraceRequest, capped, fitting, read_trace

TEXT = " ".join(f"word{i * i % 9973}" for i in range(4000))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_are_read(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    texts = write(tmp_path / "p.jsonl", [{"prompt": "x", "max_tokens": 3}, talk, {"turns": ["q", "r"]}])
    prompt, shared, turn = read_trace(texts)
    assert (prompt.prompt, prompt.output_tokens) == ("x", 3)
    assert shared.messages == ({"role": "user", "content": "a"},)
    assert turn.messages == ({"role": "user", "content": "q"},)
    body = tmp_path / "b.json"
    body.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}, indent=2))
    assert read_trace(body)[0].messages == ({"role": "user", "content": "hi"},)
    # a line separator of Unicode ends no line
    body.write_bytes(('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n').encode())
    assert [r.prompt for r in read_trace(body)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "hello", "{}", "TIMESTAMP,ContextTokens\nx,1\n", '{"prompt": "x", "timestamp": NaN}', "[" * 5000],
)
def test_what_is_no_trace_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.jsonl"):
        read_trace(path)


def test_requests_are_left_out_and_cut() -> None:
    requests = [TraceRequest(0, 100, 50), TraceRequest(0, 100, 10), TraceRequest(0, 0, 0, prompt="x")]
    assert fitting(requests, 120) == requests[1:]
    assert [r.output_tokens for r in capped(requests, 20)] == [20, 10, 20]


@pytest.mark.parametrize("pieces", [TEXT, [int(c) for c in range(20_000)]], ids=["text", "tokens"])
def test_equal_blocks_are_equal_text_and_others_are_not(pieces: Any) -> None:
    source = BlockText(pieces)
    one = source.prompt(TraceRequest(0, 1300, 1, (5, 6, 7)))
    two = source.prompt(TraceRequest(0, 1024 + 100, 1, (5, 6, 9)))
    assert len(one) == 1300
    assert len(two) == 1124
    assert one[:1024] == two[:1024]
    assert one[1024:1124] != two[1024:]
    starts = {tuple(source.prompt(TraceRequest(0, 512, 1, (block,)))) for block in range(2000)}
    assert len(starts) == 2000
    fresh = [source.prompt(TraceRequest(0, 600, 1)) for _ in range(2)]
    assert fresh[0][:64] != fresh[1][:64]
    with pytest.raises(ConfigError, match="block"):
        BlockText(pieces[:400])


def simulated(requests: list[TraceRequest], page: int, pages: int | None) -> list[int]:
    """The same cache, written down plainly: whole prefixes as keys, the least recent one searched for."""
    used: dict[tuple[Any, ...], float] = {}
    found, clock = [], 0.0
    for number, request in enumerate(requests):
        tokens = [(b, i) for b in request.blocks for i in range(512)][: request.prompt_tokens]
        tokens += [(-1 - number, i) for i in range(request.output_tokens - 1)]
        keys = [tuple(tokens[:end]) for end in range(page, len(tokens) + 1, page)]
        hits = 0
        for key in keys:
            if len(key) >= request.prompt_tokens or key not in used:
                break
            hits = len(key)
        found.append(hits)
        for key in reversed(keys):
            clock += 1
            used[key] = clock
        while pages is not None and len(used) > pages:
            del used[min(used, key=lambda key: used[key])]
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 512), st.integers(1, 300)),
        max_size=8,
    ),
    pages=st.none() | st.integers(1, 20),
)
def test_allowed_hits_are_those_of_a_plain_cache(rows: list[tuple[list[int], int, int]], pages: int | None) -> None:
    requests = [TraceRequest(0, (len(b) - 1) * 512 + last, new, tuple(b)) for b, last, new in rows]
    assert allowed_hits(requests, 128, pages) == simulated(requests, 128, pages)


def test_arrivals() -> None:
    requests = [TraceRequest(float(i), 1, 1) for i in range(400)]
    assert arrivals(requests, LoadShape(speed=2.0))[:3] == [0.0, 0.5, 1.0]
    assert set(arrivals(requests, LoadShape())) == {0.0}
    random = arrivals(requests, LoadShape(rate=10.0, seed=1))
    assert random == sorted(random)
    assert 30 < random[-1] < 50


def test_a_summary_counts_what_was_good() -> None:
    records = [
        Record(0, 0.0, 100, 50, 11, 0.5, 1.5, [0.1] * 10), Record(1, 0.5, 100, 0, 1, 2.0, 2.0),
        Record(2, 1.0, error="500 broken"),
    ]  # fmt: skip
    found = summary(Outcome(records, 4.0), parse_goals(["ttft:1000", "tpot:100"]))
    assert (found["completed"], found["failed"], found["failures"]) == (2, 1, {"500 broken": 1})
    assert found["cached_share"] == 0.25
    assert found["output_tokens_per_s"] == 3.0
    assert found["good_requests_per_s"] == 0.25
    assert found["ttft"]["p50"] == pytest.approx(1.25)
    assert found["itl"]["p99"] == pytest.approx(0.1)
    assert found["most_open"] == 3 - 1
    for wrong in ("ttft", "ttft:x", "speed:3", "ttft:-1"):
        with pytest.raises(ConfigError, match=wrong):
            parse_goals([wrong])


@pytest.fixture(scope="module")
def server(byte_loaded: LoadedModel) -> Iterator[Running]:
    with running(engine_of(byte_loaded, kv_cache_memory=8 << 20)) as found:
        yield found


def bench(*options: str) -> int:
    with pytest.raises(SystemExit) as end:
        run(["bench-serve", *options])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_trace_is_replayed_with_its_shared_prefixes(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [[0], [0, 1], [2], [0, 1], [2, 3]]
    rows = [{"timestamp": 0, "input_length": 512 * len(b) - 100, "output_length": 5, "hash_ids": b} for b in blocks] + [
        {"timestamp": 0, "input_length": 5000, "output_length": 5, "hash_ids": list(range(10, 20))}
    ]
    trace, text = write(tmp_path / "trace.jsonl", rows), tmp_path / "text.txt"
    text.write_text(TEXT)
    target, picture = tmp_path / "out.json", tmp_path / "out.png"
    code = bench(
        "--base-url", server.url + "/v1", "--trace", str(trace), "--text", str(text), "--speed", "inf",
        "--max-concurrency", "1", "--goodput", "ttft:60000", "--json", str(target), "--picture", str(picture),
    )  # fmt: skip
    assert code == 0
    found = json.loads(target.read_text())
    want = [TraceRequest(0, r["input_length"], 5, tuple(r["hash_ids"])) for r in rows[:5]]  # type: ignore[arg-type,call-overload]
    assert [r["prompt_tokens"] for r in found["records"]] == [r.prompt_tokens for r in want]
    assert [r["cached_tokens"] for r in found["records"]] == allowed_hits(want, 64)
    assert [r["output_tokens"] for r in found["records"]] == [5] * 5
    assert found["good_share"] == 1.0
    assert found["most_open"] == 1
    assert found["records"][1]["digest"] == found["records"][3]["digest"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "5, 0" in capsys.readouterr().out


def test_chats_are_sent_as_they_are_and_failures_are_counted(server: Running, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    bad = {"messages": [{"role": "robot", "content": "hello"}], "max_tokens": 4}
    target = tmp_path / "out.json"
    path = write(tmp_path / "chats.jsonl", [chat, bad, chat])
    assert (
        bench("--base-url", server.url, "--dataset-path", str(path), "--request-rate", "100", "--json", str(target))
        == 0
    )
    found = json.loads(target.read_text())
    assert (found["completed"], found["failed"]) == (2, 1)
    assert "role" in found["records"][1]["error"]
    asked = httpx.post(server.url + "/v1/chat/completions", json=chat | {"temperature": 0}).json()
    assert found["records"][0]["prompt_tokens"] == asked["usage"]["prompt_tokens"]


def test_a_server_that_does_not_tokenize_gets_text(server: Running, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("kvbits.replay.target.Target.tokenize", lambda self, text: None)
    path = write(tmp_path / "t.jsonl", [{"input_length": 100, "output_length": 3}])
    target = tmp_path / "out.json"
    assert bench("--base-url", server.url, "--trace", str(path), "--json", str(target)) == 0
    # This model's tokens are bytes; the estimate is four characters a token.
    assert json.loads(target.read_text())["prompt_tokens"] == 400


def test_a_mistake_is_one_line(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "t.jsonl", [{"input_length": 5000, "output_length": 3}]))
    for options, named in (
        (["--base-url", "nowhere"], "nowhere"),
        (["--base-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--base-url", server.url, "--model", "other"], MODEL),
        (["--base-url", server.url], "1024"),
        (["--base-url", server.url, "--speed", "0"], "speed"),
        (["--base-url", server.url, "--goodput", "x"], "goodput"),
    ):
        assert bench("--trace", path, *options) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_goes_away_is_a_failure_not_an_exception(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded)) as server:
        target = find_target(server.url, None, None)
    outcome = asyncio.run(replay(target, [TraceRequest(0, 3, 3)], ["abc"], LoadShape()))
    assert outcome.records[0].error is not None
