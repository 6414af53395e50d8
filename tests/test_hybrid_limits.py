"""Models with recurrent layers: what a plan says of them, and what is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import httpx
import pytest
import torch
from helpers.hybrids import hybrid_engine, loaded_of, prompt
from helpers.serving import MODEL, byte_model, engine_of, packed_byte_model, running
from helpers.tiny import save, tiny_config, tiny_model
from transformers import AutoConfig

from kvbits import LLM, SamplingParams
from kvbits.calibration.goal import Goal, Sizes
from kvbits.calibration.run import calibrate
from kvbits.codecs import parse_policy
from kvbits.codecs.states import StateLayout
from kvbits.config import ModelGeometry
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.engine.speculation.methods import draft_model
from kvbits.engine.transfer import PageBundle, export_pages, import_pages
from kvbits.errors import UnsupportedError
from kvbits.models import geometry_of, load_model
from kvbits.models.outline import outline_of
from kvbits.planning.core import plan
from kvbits.server.options import ServerOptions
from kvbits.server.run import start_line


def test_geometry_says_which_layers_are_which() -> None:
    found = geometry_of(tiny_config("nemotron_h"))
    assert (found.num_layers, found.places) == (1, (1,))
    assert [(s.layer, s.kind, s.shape, s.wide) for s in found.states] == [
        (0, "conv", (192, 4), False),
        (0, "recurrent", (8, 16, 16), True),
        (2, "conv", (192, 4), False),
        (2, "recurrent", (8, 16, 16), True),
    ]
    both = geometry_of(tiny_config("falcon_h1"))
    assert (both.num_layers, both.places, len(both.states)) == (3, (), 6)


def test_the_state_of_qwen3_next_is_as_published() -> None:
    """36 of 48 layers with 32 heads of 128 by 128 in float32 and 4 inputs of 8,192 channels in 16 bit."""
    geometry = geometry_of(AutoConfig.for_model("qwen3_next"))
    assert geometry.num_layers == 12
    assert StateLayout.of(geometry).slot_bytes == 36 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)


def test_a_plan_holds_what_an_engine_does() -> None:
    geometry, memory = loaded_of("bamba").geometry, 1 << 20
    wide = dataclasses.replace(geometry, states=tuple(dataclasses.replace(s, wide=True) for s in geometry.states))
    made = plan(wide, [parse_policy("int8", geometry.num_layers)], memory, [256], max_num_seqs=8)
    engine = hybrid_engine("bamba", kv_cache_dtype="int8", kv_cache_memory=memory)
    assert made.state_bytes == engine.pool.states.slot_bytes
    scheme = made.schemes[0]
    assert scheme.num_frames == engine.pool.num_frames
    assert scheme.contexts[0].sessions == min(engine.pool.sessions_capacity(256), engine.pool.states.num_slots)
    assert scheme.contexts[0].session_bytes == engine.pool.layout.session_bytes(256) + made.state_bytes


def test_a_plan_without_a_limit_gives_every_session_its_slot() -> None:
    geometry, memory = geometry_of(tiny_config("bamba")), 10 << 20
    scheme = plan(geometry, [parse_policy("int8", geometry.num_layers)], memory, [256]).schemes[0]
    sessions = scheme.contexts[0].sessions

    def fits(count: int) -> bool:
        states = StateLayout.of(geometry)
        slots = states.slots(memory, count)
        pages = count * (scheme.contexts[0].session_bytes - states.slot_bytes)
        return count <= slots and pages <= memory - slots * states.slot_bytes

    assert sessions > 20
    assert fits(sessions)
    assert not fits(sessions + 1)


def test_files_are_loaded_and_answered_from(tmp_path: Path) -> None:
    """As a user does: a directory, in bfloat16 with packed layers, through ``kvbits.LLM``."""
    name = save(tiny_model("lfm2"), tmp_path)
    assert outline_of(name).geometry is None
    llm = LLM(name, kv_cache_dtype="int8", kv_cache_memory="8MiB")
    assert llm.engine.loaded.fused is None
    assert llm.engine.pool.states.dtype == torch.bfloat16
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    answers = [llm.generate("w5 w6 w7", params)[0].outputs[0].token_ids for _ in range(2)]
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]


def test_a_server_says_which_layers_are_recurrent_and_counts_their_slots() -> None:
    loaded = packed_byte_model(family="lfm2", fused=False)
    engine = engine_of(loaded, max_num_seqs=4)
    assert "layers: transformers'; 2 recurrent layers (0, 2) run" in start_line(engine, ServerOptions(MODEL), "here", 1)
    body = {"model": MODEL, "prompt": "a" * 100, "max_tokens": 3, "temperature": 0}
    with running(engine) as server:
        found = [httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json() for _ in range(2)]
        server.idle()
        metrics = httpx.get(f"{server.url}/metrics").text
    assert found[0]["choices"] == found[1]["choices"]
    for use, count in (("free", engine.pool.states.num_slots - 1), ("sequences", 0), ("snapshots", 1)):
        assert f'kvbits:state_slots{{model_name="{MODEL}",use="{use}"}} {count}.0' in metrics


def test_a_gpu_is_refused_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save(tiny_model("lfm2"), tmp_path)
    monkeypatch.setattr("kvbits.models.load.find_device", lambda _: torch.device("meta"))
    monkeypatch.setattr("kvbits.models.load.check_formats", lambda *_: None)
    with pytest.raises(UnsupportedError, match="the cache on 'cuda' has no place for the states"):
        load_model(name, device="cuda")


def test_what_has_no_place_for_states_is_refused_by_name(tmp_path: Path) -> None:
    loaded, engine = loaded_of("lfm2"), hybrid_engine("lfm2")
    has = r"has no place for the states of recurrent layers; lfm2 has 2 of them, the first is layer 0"
    with pytest.raises(UnsupportedError, match=f"a bundle of pages {has}"):
        export_pages(engine, prompt(200))
    with pytest.raises(UnsupportedError, match=f"a bundle of pages {has}"):
        import_pages(engine, PageBundle(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.uint8), {}))
    with pytest.raises(UnsupportedError, match=f"the speculative method 'self' {has}"):
        Engine(loaded, engine.config, speculative=SpeculativeConfig(method="self"))
    chosen = SpeculativeConfig(method="draft_model", model="x")
    with pytest.raises(UnsupportedError, match=f"a draft model's cache {has}"):
        draft_model(loaded, chosen, loaded, EngineConfig())
    with pytest.raises(UnsupportedError, match=f"calibration {has}"):
        calibrate(loaded, [], tmp_path, Goal(bits=4), None, Sizes(256), None, print)


def test_a_plain_model_is_not_refused() -> None:
    plain: ModelGeometry = byte_model().geometry
    plain.refuse_states("anything")
    assert [plain.index_of(i) for i in range(3)] == [0, 1, 2]
