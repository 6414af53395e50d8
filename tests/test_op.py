"""Attention as an operator: torch's own checks of it, and a model that is traced through it."""

from __future__ import annotations

import torch
from helpers.attention import make_inputs
from helpers.driver import Driver, Frames
from helpers.tiny import tiny_model

from kvbits.attention import Forward
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import BatchLayout
from kvbits.kernels.op import attend_paged
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models.load import wrap

LAYER = LayerGeometry(4, 2, 16, 16, 0.25, sinks=True)


def test_torch_finds_no_fault_in_it() -> None:
    """Schema (what it changes), fake tensors, tracing with fixed and open sizes."""
    frames = Frames(ModelGeometry("test", (LAYER, LAYER), 8192, 16), "int4", 16)
    step = Forward(frames.pool, ReferenceBackend(), BatchLayout.of([frames.slice(0, 66)]))
    inputs = make_inputs(LAYER, [66])
    assert inputs.sinks is not None
    rows = [part[0].bfloat16() for part in (inputs.query, inputs.key, inputs.value)]
    arguments = (*rows, inputs.sinks, frames.pool.buffer, step.number, 1)
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    found = torch.library.opcheck(attend_paged, arguments, test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")
    own = attend_paged(*arguments)
    assert torch.equal(own, ReferenceBackend().forward(frames.pool.layers[1], step.batch, *rows, inputs.sinks))


def test_a_compiled_model_gives_the_same_logits() -> None:
    """One graph from the tokens to the logits, attention an operator in it; the cache is written through it."""
    model = tiny_model("llama")
    loaded = wrap(model, None, "tiny")
    eager, compiled = (Driver(loaded, "int4", ReferenceBackend()) for _ in range(2))
    prompt = torch.arange(4, 71).tolist()
    expected = eager.step({0: prompt})[0]
    batch = BatchLayout.of([compiled.frames.slice(0, len(prompt))])
    step = Forward(compiled.frames.pool, compiled.backend, batch)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    rows = torch.arange(len(prompt))
    run = torch.compile(model, backend=keep, fullgraph=True)
    with torch.inference_mode():
        out = run(input_ids=torch.tensor([prompt]), position_ids=rows[None], use_cache=False, kvbits=step)
    assert torch.equal(out.logits[0].float(), expected)
    assert torch.equal(compiled.frames.page_bytes(0), eager.frames.page_bytes(0))
    calls = [n for graph in graphs for n in graph.graph.nodes if "attend_paged" in str(n.target)]
    assert len(graphs) == 1
    assert len(calls) == loaded.geometry.num_layers
