"""The gradients of a calibration, layer by layer, against autograd over the whole model and against real errors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.attention import SHAPES, make_inputs, run
from helpers.plain_gradients import PlainBackend, pages_of, plain_gradients, plain_logits
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kvbits.calibration import attention as blocks
from kvbits.calibration.collect import collect
from kvbits.calibration.dense import DenseBackend, Window
from kvbits.calibration.layerwise import Layers
from kvbits.errors import UnsupportedError
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models import LoadedModel
from kvbits.models.load import wrap


def words(count: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(4, 97) for _ in range(count)]


def loaded_of(family: str, **changes: object) -> LoadedModel:
    return wrap(tiny_model(family, **changes), tiny_tokenizer(), family)


def biased(offset: float = 50.0) -> LoadedModel:
    """Key biases that put a large constant into two channels, as Qwen2.5's do; random ones elsewhere."""
    loaded = loaded_of("qwen2")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.bias.copy_(torch.randn(projection.bias.shape, generator=generator))
            layer.self_attn.k_proj.bias[[3, 17]] += offset
    return loaded


MODELS: dict[str, Callable[[], LoadedModel]] = {
    **{family: lambda family=family: loaded_of(family) for family in FAMILIES if family != "deepseek_v3"},
    "qwen2-biases": biased,
}


def gradients_of(loaded: LoadedModel, window: list[int], seed: int = 0) -> dict[int, tuple[Window, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shares: list[float] = []
    found = {i: (seen, k, v) for i, seen, k, v in Layers(loaded).gradients(window, generator, shares.append)}
    assert shares == sorted(shares)
    assert shares[-1] == 1
    return found


@pytest.mark.parametrize("block", [1, blocks._BLOCK])
@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_is_autograd_over_the_whole_model(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", block)  # a page of queries at a time, or all
    loaded, window = MODELS[name](), words(400)
    found = gradients_of(loaded, window)
    rows, gradients = plain_gradients(loaded, window)
    for layer, (row, gradient) in enumerate(zip(rows, gradients, strict=True)):
        seen, *by_error = found[layer]
        for got, expected in zip((seen.key, seen.value), row, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        for got, expected in zip(by_error, gradient, strict=True):
            assert expected[:320].count_nonzero() > 1000
            assert not got[384:].any()  # nothing reads the last page as a code
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["gemma3_text", "qwen2-biases"])
def test_gradients_are_slopes_of_the_loss(name: str) -> None:
    """Real errors of both signs in one layer's rows, windows and biases included, against what gradients foretell."""
    loaded, window = MODELS[name](), words(256)
    found = gradients_of(loaded, window)
    base = plain_logits(loaded, window, PlainBackend({}))[128:].log_softmax(-1).detach()
    labels = torch.multinomial(base.exp(), 1, generator=torch.Generator().manual_seed(0))

    def loss(layer: int, key: Tensor, value: Tensor) -> float:
        with torch.no_grad():
            logits = plain_logits(loaded, window, PlainBackend({layer: (key, value)}))[128:].double()
        return -float(logits.log_softmax(-1).gather(-1, labels).sum())

    generator = torch.Generator().manual_seed(5)
    for layer in range(3):
        seen, *by_error = found[layer]
        for side in (0, 1):
            # along the gradient, bent at random: a direction in which the loss moves
            step = [torch.zeros_like(seen.key), torch.zeros_like(seen.value)]
            step[side] = by_error[side] * (0.5 + torch.rand(by_error[side].shape, generator=generator))
            foretold = float((step[side] * by_error[side]).sum())
            size = 0.02 / foretold
            up, down = (loss(layer, *(sign * size * s for s in step)) for sign in (1, -1))
            assert (up - down) / (2 * size) == pytest.approx(foretold, rel=0.02)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2-biases"])
@pytest.mark.parametrize("side", [0, 1])
def test_gradients_predict_the_divergence(name: str, side: int) -> None:
    """A small random error in one layer: the KL measured against the one that the gradients foretell."""
    loaded, window, layer, size = MODELS[name](), words(256), 1, 0.02
    generator = torch.Generator().manual_seed(1)
    draws = [collect(loaded, [window], seed).samples[2 * layer + side] for seed in range(12)]
    with torch.no_grad():
        base = plain_logits(loaded, window, PlainBackend({}))[128:].double().log_softmax(-1)
        measured = predicted = 0.0
        for _ in range(4):
            error = size * torch.randn(draws[0].rows.shape, generator=generator)
            errors = [torch.zeros(256, 2, loaded.geometry.layers[layer].key_dim) for _ in range(2)]
            errors[side][64:] = error.transpose(1, 2).flatten(0, 1)
            moved = plain_logits(loaded, window, PlainBackend({layer: (errors[0], errors[1])}))[128:].double()
            measured += float((base.exp() * (base - moved.log_softmax(-1))).sum())
            predicted += sum(float(s.cost(s.rows.float() + error).sum()) for s in draws) / len(draws)
    assert 0.6 < predicted / measured < 1.6, (predicted, measured)


def test_a_window_hides_pages_that_no_query_reaches() -> None:
    """Windows of 40 tokens end before the second page back: its rows may err as they like."""
    loaded, window = loaded_of("gemma3_text"), words(400)
    assert [g.window for g in loaded.geometry.layers] == [40, None, 40]
    key, value = gradients_of(loaded, window)[2][1:]
    # the last layer: scored are rows from 200 on, whose windows begin at token 161
    assert not key[:161].any()
    assert not value[:161].any()
    assert key[162:192].abs().amax((1, 2)).min() > 0
    # a query at 64 p + r sees the page before from 64 p + r - 39 on: rows 0 to 24 of a page are never read as codes
    assert not key[256:281].any()
    assert key[281:320].abs().amax((1, 2)).min() > 0


def test_collected_pages_are_those_of_the_windows_in_their_order() -> None:
    loaded, windows = loaded_of("llama"), [words(256, 1), words(256, 2)]
    found = collect(loaded, windows)
    alone = [collect(loaded, [window]) for window in windows]
    for index, window in enumerate(windows):
        for layer, row in enumerate(plain_gradients(loaded, window)[0]):
            for side in (0, 1):
                got = found.samples[2 * layer + side].rows.unflatten(0, (2, -1))[index]
                torch.testing.assert_close(got.float(), pages_of(row[side]), rtol=0.01, atol=1e-3)
    torch.testing.assert_close(found.queries[1], alone[0].queries[1] + alone[1].queries[1])
    assert found.scored == 256


# Memory


def held(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes of tensors that ``work`` holds at most, and of its largest one."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)), max(sizes)


def test_memory_is_that_of_one_layer_and_the_boundaries() -> None:
    tokens, vocab = 512, 5000

    def peak(layers: int) -> tuple[int, int]:
        loaded = loaded_of("llama", num_hidden_layers=layers, intermediate_size=512, vocab_size=vocab)
        generator = torch.Generator()
        return held(lambda: [None for _ in Layers(loaded).gradients(words(tokens), generator, lambda share: None)])

    (few, largest), (many, _) = peak(2), peak(8)
    # a layer's input of 64, its attention's output of 4 heads of 16 and a sum for each
    assert many - few <= 1.05 * 6 * tokens * (64 + 64 + 4) * 4
    assert largest <= 128 * vocab * 4  # never all logits


# Models that it cannot follow


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    loaded = loaded_of("llama")
    loaded.model.model.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(loaded.model.model.layers)})
    with pytest.raises(UnsupportedError, match="keeps its 3 layers in no list"):
        collect(loaded, [words(256)])


def test_layers_that_something_happens_between_are_refused() -> None:
    loaded = loaded_of("llama")
    layers = loaded.model.model.layers
    hook = layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    with pytest.raises(UnsupportedError, match="straight to the next"):
        collect(loaded, [words(256)])
    hook.remove()
    weights = loaded.model.lm_head.weight
    assert weights.requires_grad  # the model is as it was
    collect(loaded, [words(256)])
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("shape", [name for name, layer in SHAPES.items() if not layer.latent])
def test_dense_attention_follows_window_softcap_and_sinks(shape: str) -> None:
    layer = SHAPES[shape]
    inputs = make_inputs(layer, [200])
    rounded = replace(inputs, key=[inputs.key[0].bfloat16().float()], value=[inputs.value[0].bfloat16().float()])
    expected, _ = run(ReferenceBackend(), layer, "bf16", rounded)
    got, _ = run(DenseBackend(), layer, "bf16", rounded)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
