"""The plan against what the real engine admits and holds."""

from __future__ import annotations

import pytest
from helpers.tiny import tiny_model, tiny_tokenizer

from kvbits.codecs import parse_policy
from kvbits.config import WATERMARK
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.models.load import wrap
from kvbits.planning import plan


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "int4+sink:int8"])
@pytest.mark.parametrize(("context", "pages"), [(63, 20), (64, 41), (200, 110), (400, 333)])
def test_the_engine_admits_and_holds_what_was_planned(dtype: str, context: int, pages: int) -> None:
    loaded = wrap(tiny_model("llama", num_hidden_layers=8), tiny_tokenizer(), "tiny")
    geometry = loaded.geometry
    memory = pages * 64 * geometry.bytes_per_token_16bit() + 777
    (scheme,) = plan(
        geometry, [parse_policy(dtype, geometry.num_layers)], memory, [context], watermark=WATERMARK
    ).schemes
    (at,) = scheme.contexts
    count = at.sessions + 4
    config = EngineConfig(
        kv_cache_dtype=dtype, kv_cache_memory=memory, max_num_seqs=count, max_num_batched_tokens=count * context
    )
    engine = Engine(loaded, config)
    for session in range(count):
        engine.add_request(
            [4 + (session * 31 + i * i) % 90 for i in range(context)],
            SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
            salt=str(session),
        )
    engine.step()
    assert engine.load().running == at.admitted
    assert at.sessions - at.admitted <= 1 + engine.pool.num_frames // WATERMARK // engine.pool.layout.frames_of(context)
    stats = engine.pages.stats()
    assert stats.open + stats.sealed == at.admitted * at.session_bytes // scheme.frame_bytes
    # and those that did not fit run when the others are done
    done = 0
    while engine.has_unfinished():
        done += sum(delta.finish_reason is not None for delta in engine.step())
    assert done == count
