"""Recorded decode steps, on the CPU: a graph that runs its step again stands for the device's."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from helpers.recorded import Rerun, Watched, check_reads, recording
from helpers.tiny import tiny_model
from helpers.tiny_engine import PROMPTS, loaded, make, one_thread, original, packed, prompt_of, tokens
from torch import Tensor

from kvbits.engine import graphs
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.graphs import SIZES, DecodeGraphs
from kvbits.engine.params import SamplingParams
from kvbits.kernels import SequencePages
from kvbits.kernels.base import BatchLayout
from kvbits.kernels.reference import ReferenceBackend
from kvbits.kernels.static import refill, static_layout
from kvbits.models import LoadedModel
from kvbits.models.load import wrap

__all__ = ["loaded", "one_thread", "original", "packed"]


class Broken(Rerun):
    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[DecodeGraphs]:
    """Engines made in the test record their steps; what they recorded."""
    return recording(monkeypatch, Rerun)


@pytest.mark.parametrize("dtype", ["int4", "int8+sink:bf16"])
def test_replayed_steps_give_the_same_tokens(packed: LoadedModel, recorded: list[DecodeGraphs], dtype: str) -> None:
    """Prompts of all lengths, pages that fill meanwhile, sequences that end and leave their places to others."""
    params = [SamplingParams(temperature=0.0, max_tokens=5 + 9 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    got = tokens(make(packed, ReferenceBackend(), dtype), PROMPTS, params)
    assert Rerun.replays > 60
    sizes = {key[0] for key in recorded[-1]._known}
    assert sizes == {1, 2, 4, 8}
    before = Rerun.replays
    llm = make(packed, ReferenceBackend(), dtype)
    llm.engine._runner.graphs = None
    assert tokens(llm, PROMPTS, params) == got
    assert Rerun.replays == before


def test_what_a_recording_reads_lives_as_long_as_it(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's graph reads addresses: memory that went back to the allocator would hold anything."""
    made = recording(monkeypatch, Watched)
    make(loaded, ReferenceBackend(), "int4", max_num_seqs=2).engine.warm_up(lambda line: None)
    check_reads(made[-1], [1, 1, 2, 2])


def test_deeper_sequences_get_recordings_of_their_own(
    packed: LoadedModel, recorded: list[DecodeGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_LEAST_PAGES", 1)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (20, 4)]
    tokens(make(packed, ReferenceBackend(), "int8"), [prompt_of(30), prompt_of(200)], params)
    assert {key[:2] for key in recorded[-1]._known} == {(2, 4), (1, 1)}


def test_what_cannot_be_recorded_runs_without(
    packed: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = recording(monkeypatch, Broken)
    with caplog.at_level(logging.WARNING):
        got = tokens(make(packed, ReferenceBackend(), "int4"), PROMPTS[:3])
    assert made[-1].off == "RuntimeError: operation not permitted when stream is capturing"
    told = [r.message for r in caplog.records if "run without" in r.message]
    assert told == [f"Steps cannot be recorded as graphs; they run without: {made[-1].off}"]
    monkeypatch.undo()
    assert got == tokens(make(packed, ReferenceBackend(), "int4"), PROMPTS[:3])


def test_warming_up_records_before_a_request_comes(packed: LoadedModel, recorded: list[DecodeGraphs]) -> None:
    llm = make(packed, ReferenceBackend(), "int4", max_num_seqs=5)
    lines: list[str] = []
    llm.engine.warm_up(lines.append)
    assert lines == [
        "Warming up: a prompt of 512 tokens",
        *(f"Warming up: steps of {size} sequences" for size in (1, 2, 4, 8)),
    ]
    known = set(recorded[-1]._known)
    tokens(llm, PROMPTS[:5])
    assert set(recorded[-1]._known) == known


def test_a_layout_is_refilled_where_it_is() -> None:
    def batch(*starts: int) -> BatchLayout:
        return BatchLayout.of([SequencePages(s, 1, range(100, 100 + (s + 1) // 64), [s], [s + 1]) for s in starts])

    layout = static_layout(4, 16, 1, 0)
    assert layout.counts.tolist() == [0, 0, 0, 0]
    assert layout.num_rows == 4
    calls = []
    layout.refreshers.append(lambda: calls.append(layout.starts.tolist()))
    refill(layout, batch(63, 640, 5))
    sealed = layout.sealed
    refill(layout, batch(5, 130))
    assert calls == [[63, 640, 5, 0], [5, 130, 0, 0]]
    assert layout.sealed is sealed
    assert layout.counts.tolist() == [1, 1, 0, 0]
    assert [row[row >= 0].tolist() for row in sealed] == [[], [100, 101], [], []]
    assert layout.head[:, 0].tolist() == [5, 130, 0, 0]
    with pytest.raises(AssertionError):
        refill(layout, batch(64 * 17))
    assert tuple(2**i for i in range(7)) == SIZES


@pytest.mark.triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_devices_own_graphs() -> None:
    """Steps that the GPU replays give the tokens of steps that it does not."""
    answers = []
    for graphs_are_on in (True, False):
        model = tiny_model("llama", max_position_embeddings=1024, head_dim=64).to(torch.bfloat16).to("cuda")
        engine = Engine(wrap(model, None, "tiny"), EngineConfig("int8", 1 << 24))
        if not graphs_are_on:
            engine._runner.graphs = None
        else:
            assert engine._runner.graphs is not None
            assert engine._runner.graphs.off is None
        engine.add_request(prompt_of(100), SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True))
        answers.append([t for _ in range(100) for delta in engine.step() for t in delta.token_ids])
    assert len(answers[0]) == 80
    assert answers[0] == answers[1]
