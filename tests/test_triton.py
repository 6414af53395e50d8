"""The Triton kernels against the reference: in Triton's interpreter, or on a GPU where there is one.

The tests that are marked run kernels. Triton decides when it is imported whether it interprets, so ``make test`` runs
them in a process of their own; ``make test-gpu`` runs them on the device.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.attention import PLAIN, SHAPES, Inputs, check_read_again, check_tentative_step, make_inputs, run
from helpers.driver import Frames
from helpers.hard_pages import assert_same, broken_pages, expected, hard_pages, sealed
from helpers.huge import assert_huge_pages_are_read
from helpers.on_device import OnDevice
from helpers.rounding import pages, rounding_of
from helpers.tiny import tiny_model
from torch import Tensor

from kvbits.codecs import SCHEMES, Codec, Scheme, Side
from kvbits.codecs.base import Rounding
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.hf import QuantizedCache
from kvbits.kernels import BatchLayout, choose_backend
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models.load import wrap

pytest.importorskip("triton", reason="Triton exists for Linux only")

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = LayerGeometry(3, 1, 64, 64, 64**-0.5)
ODD = {
    "fp8_e5m2": LayerGeometry(2, 1, 80, 80, 80**-0.5),
    "int8h": LayerGeometry(2, 1, 80, 96, 80**-0.5),
    "int3": LayerGeometry(2, 1, 96, 96, 96**-0.5),
    "nf4": LayerGeometry(2, 1, 96, 80, 96**-0.5),
    "int4b32": LayerGeometry(2, 1, 80, 96, 80**-0.5),
    "mix8_4": LayerGeometry(2, 1, 192, 128, 192**-0.5),
    "mix4_2": LayerGeometry(2, 1, 256, 256, 256**-0.5),
}


def assert_agrees(layer: LayerGeometry, dtype: str, lengths: list[int], chunk: int = 129, draft: bool = False) -> None:
    """Page bytes equal; float32 rows within the order of summation."""
    inputs = make_inputs(layer, lengths)
    expected, expected_pages = run(ReferenceBackend(), layer, dtype, inputs, chunk, draft=draft)
    got, got_pages = run(OnDevice(), layer, dtype, inputs, chunk, draft=draft)
    for a, b in zip(got_pages, expected_pages, strict=True):
        assert torch.equal(a, b)
    assert (torch.cat(got) - torch.cat(expected)).abs().max() <= 2e-5


@pytest.mark.triton
@pytest.mark.parametrize("dtype", SCHEMES)
def test_every_dtype(dtype: str) -> None:
    """A chunk over a page boundary, then a single token."""
    assert OnDevice().supports(SCHEMES[dtype], SMALL) is None
    assert_agrees(SMALL, dtype, [66], 65)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [name for name, layer in SHAPES.items() if not layer.latent])
def test_every_shape(shape: str) -> None:
    layer, length = SHAPES[shape], 130 if "window" in shape else 66
    assert_agrees(replace(layer, num_heads=layer.group_size, num_kv_heads=1), "int4", [length], length - 1)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", ODD)
def test_head_sizes_that_are_no_powers_of_two(dtype: str) -> None:
    assert_agrees(ODD[dtype], dtype, [66], 65)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", ["nf4+sink:int8", "int4+sink:nf4", "nf3+sink:nf4", "bf16/nf4+sink:bf16"])
def test_first_pages_in_a_format_of_their_own(dtype: str) -> None:
    assert_agrees(replace(SMALL, window=100), dtype, [130], 129)


@pytest.mark.triton
def test_sequences_of_all_kinds_in_one_step() -> None:
    assert_agrees(replace(PLAIN, num_heads=2), "int4/int8h", [1, 64, 66], 60)


@pytest.mark.triton
def test_drafts() -> None:
    assert_agrees(SMALL, "int8h/int4", [66], 65, draft=True)


@pytest.mark.triton
@pytest.mark.parametrize("window", [None, 1100])
def test_pages_of_another_backend_in_several_splits(window: int | None) -> None:
    """The CPU's kernels store 2,100 tokens; one more attends to their pages in three splits."""
    layer = replace(SMALL, window=window, sinks=True)
    inputs = make_inputs(layer, [2101])
    rows = [x[0] for x in (inputs.query, inputs.key, inputs.value)]
    frames = Frames(ModelGeometry("test", (layer, layer), 8192, 16), "int8", 80)
    view = frames.pool.layers[1]
    CpuBackend().forward(view, BatchLayout.of([frames.slice(0, 2100)]), *(x[:2100] for x in rows), inputs.sinks)
    batch = BatchLayout.of([frames.slice(0, 1)])
    before = view.buffer.clone()
    expected = ReferenceBackend().forward(view, batch, *(x[2100:] for x in rows), inputs.sinks)
    view.buffer.copy_(before)
    got = OnDevice().forward(view, batch, *(x[2100:] for x in rows), inputs.sinks)
    assert (got - expected).abs().max() <= 2e-5


@pytest.mark.triton
def test_layers_that_read_the_same_keys_again() -> None:
    check_read_again(OnDevice(), (60, 10, 1))


@pytest.mark.triton
def test_chunked_attention_is_refused() -> None:
    layer = replace(SMALL, window=50, chunked=True)
    assert "chunked" in str(OnDevice().supports(SCHEMES["int8"], layer))


@pytest.mark.triton
def test_pages_that_these_kernels_sealed_are_read_by_the_others() -> None:
    inputs = make_inputs(SMALL, [150])
    rows = [x[0] for x in (inputs.query, inputs.key, inputs.value)]
    outputs = []
    for first in (ReferenceBackend(), OnDevice()):
        frames = Frames(ModelGeometry("test", (SMALL, SMALL), 8192, 16), "nf4/int4b32", 16)
        view = frames.pool.layers[1]
        first.forward(view, BatchLayout.of([frames.slice(0, 140)]), *(x[:140] for x in rows), None)
        batch = BatchLayout.of([frames.slice(0, 10)])
        outputs.append(CpuBackend().forward(view, batch, *(x[140:] for x in rows), None))
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.triton
def test_a_tentative_step_leaves_the_head_page_as_it_was() -> None:
    check_tentative_step(OnDevice)


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "clip"), [("int4", 0.7), ("int8", None), ("int8h", 0.7), ("nf3", 0.7)])
def test_calibrated_rounding(dtype: str, clip: float | None) -> None:
    layer = LayerGeometry(2, 2, 32, 32, 0.1)
    inputs = make_inputs(layer, [70])
    rounding = rounding_of(layer, clip)
    expected = pages(ReferenceBackend(), layer, dtype, inputs, rounding)
    assert torch.equal(pages(OnDevice(), layer, dtype, inputs, rounding), expected)
    plain = pages(ReferenceBackend(), layer, dtype, inputs, replace(rounding, key=Rounding(), value=Rounding()))
    assert not torch.equal(plain, expected)


@pytest.mark.triton
def test_a_calibrated_order_chooses_the_wider_channels() -> None:
    inputs = make_inputs(SMALL, [70])
    rounding = rounding_of(SMALL, 0.7)
    expected = pages(ReferenceBackend(), SMALL, "mix8_2", inputs, rounding)
    assert torch.equal(pages(OnDevice(), SMALL, "mix8_2", inputs, rounding), expected)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", SCHEMES)
def test_hard_and_broken_pages_have_the_bytes_of_the_reference(dtype: str) -> None:
    broken = {} if dtype == "bf16" else broken_pages(64)  # which NaN a bfloat16 page holds is not defined
    hard = hard_pages(64) | broken
    few = {what: hard[what] for what in (*list(hard)[:12], *list(hard)[13::3])}
    assert_same(sealed(OnDevice(), dtype, few), expected(dtype, few), list(few))


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "clip"), [("int4", 0.7), ("int8", None), ("int8h", 0.7), ("nf3", 0.7)])
def test_hard_pages_with_calibrated_rounding(dtype: str, clip: float | None) -> None:
    hard = hard_pages(32) | broken_pages(32)
    names = ("a zero row", "zeros of both signs", "equal rows", "outliers of -1e+20", "all times 5e+37", "several")
    few = {what: hard[what] for what in names}
    rounding = rounding_of(LayerGeometry(1, 1, 32, 32, 0.1), clip)
    assert_same(sealed(OnDevice(), dtype, few, rounding), expected(dtype, few, rounding), list(few))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_huge_numbers_in_float8_pages(dtype: str) -> None:
    assert_huge_pages_are_read(OnDevice(), dtype)


@pytest.mark.triton
def test_pages_of_extreme_numbers() -> None:
    """Constant, tiny, huge and negative channels; zeros of both signs."""
    layer = LayerGeometry(1, 1, 64, 64, 1.0)
    x = torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, :4] = torch.tensor([0.0, -0.0, 1e-30, 3.0])
    x[:, :, 4] *= 1e5
    x[:, :, 5] *= 1e-3  # no smaller: which of two zeros of unlike sign is the least is not defined
    x[:, :, 6] = 60.0 + 0.01 * x[:, :, 6]
    inputs = Inputs([x[:, :1]], [x], [x.flip(0)], None)
    for scale, dtypes in ((1.0, ("int8h", "int4", "fp8_e4m3", "nf4")), (1e-37, ("int8", "fp8_e5m2", "mix4_2"))):
        for dtype in dtypes:
            scaled = replace(inputs, key=[x * scale], value=[x.flip(0) * scale])
            _, expected = run(ReferenceBackend(), layer, dtype, scaled)
            _, got = run(OnDevice(), layer, dtype, scaled)
            assert torch.equal(got[0], expected[0]), (dtype, scale)


def assert_rounded_only(layer: LayerGeometry, dtype: str, length: int, bound: float, draft: bool = False) -> None:
    """The last token's result of bfloat16 rows, whose way over sealed pages is another than that of float32 rows."""
    inputs = make_inputs(layer, [length])
    coded, expected_pages = run(ReferenceBackend(), layer, dtype, inputs, length - 1, draft=draft)
    got, got_pages = run(OnDevice(), layer, dtype, inputs, length - 1, torch.bfloat16, draft=draft)
    assert torch.equal(got_pages[0], expected_pages[0])
    error = (got[0].float() - coded[0])[-1:]
    assert error.square().mean().sqrt() <= bound


def error_of_four_bits(layer: LayerGeometry, length: int) -> float:
    inputs = make_inputs(layer, [length])
    exact, four = (run(ReferenceBackend(), layer, dtype, inputs, length - 1)[0][0] for dtype in ("bf16", "int4"))
    return float((four - exact)[-1:].square().mean().sqrt())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", SCHEMES)
def test_bfloat16_rows(dtype: str) -> None:
    """Keys or queries, values and weights are rounded to bfloat16: that stays well below the error of 4-bit codes."""
    assert_rounded_only(SMALL, dtype, 66, 0.25 * error_of_four_bits(SMALL, 66))


@pytest.mark.triton
def test_drafts_of_bfloat16_rows() -> None:
    assert_rounded_only(SMALL, "int8h", 66, 0.25 * error_of_four_bits(SMALL, 66), draft=True)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtype", "layer"),
    [
        ("nf4+sink:int8", replace(SMALL, window=100)),
        ("int4+sink:nf4", replace(SMALL, softcap=20.0, sinks=True)),
        ("int8/int4b32", LayerGeometry(2, 1, 80, 96, 80**-0.5)),
        ("int3/int8", SMALL),
        ("int2/int6", LayerGeometry(2, 1, 128, 64, 128**-0.5)),
        ("mix8_4/fp8_e4m3", SMALL),
    ],
)
def test_bfloat16_rows_of_pages_of_two_formats(dtype: str, layer: LayerGeometry) -> None:
    assert_rounded_only(layer, dtype, 130, 0.25 * error_of_four_bits(replace(layer, softcap=None), 130))


@pytest.mark.triton
def test_the_engine_and_the_transformers_cache_run_on_it() -> None:
    model = tiny_model("mistral", num_hidden_layers=2).to(DEVICE)
    prompt = torch.arange(4, 70).unsqueeze(0).to(DEVICE)
    loaded = wrap(model, None, "tiny")
    answers = []
    for backend in (choose_backend("triton", DEVICE), ReferenceBackend() if DEVICE == "cpu" else None):
        engine = Engine(loaded, EngineConfig("int4", 1 << 22), backend)
        assert engine.pool.buffer.device.type == DEVICE
        engine.add_request(prompt[0].tolist(), SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        tokens: list[int] = []
        while engine.has_unfinished():
            for delta in engine.step():
                tokens += delta.token_ids
        answers.append(tokens)
    cache = QuantizedCache(model, "int4", kv_cache_memory="4MiB", backend="triton")
    generated = model.generate(prompt, past_key_values=cache, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert len(answers[0]) == 2
    assert answers[0] == answers[1] == generated[0, 66:].tolist()


@pytest.mark.triton
def test_bit_identical_batches_are_not_promised() -> None:
    model = tiny_model("llama").to(DEVICE)
    config = EngineConfig("int4", 1 << 22, batch_invariant=True)
    with pytest.raises(UnsupportedError, match="backend 'triton' round by the number of new tokens"):
        Engine(wrap(model, None, "tiny"), config, choose_backend("triton", DEVICE))


# Without a kernel that runs


def test_in_the_interpreter() -> None:
    """The tests above, and others that are marked so, in a process in which Triton interprets."""
    names = "triton", "triton_prompts", "static_steps", "cuda_device", "elementwise"
    files = (str(Path(__file__).with_name(f"test_{name}.py")) for name in names)
    command = [sys.executable, "-m", "pytest", "-m", "triton", "-x", "-v", *files]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-6000:]
    assert int(passed[1]) > len(SCHEMES) + len(SHAPES)


def test_a_cpu_is_refused_outside_of_the_interpreter() -> None:
    code = (
        "from kvbits.errors import ConfigError\n"
        "from kvbits.kernels import choose_backend\n"
        "try: choose_backend('triton', 'cpu')\n"
        "except ConfigError as error: print(error)"
    )
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "the backend 'triton' needs a GPU; the device is 'cpu'. Choose the backend 'cpu', or a device such as 'cuda'\n"
    )


def test_backends_go_by_the_device() -> None:
    assert isinstance(choose_backend(None), CpuBackend)
    assert isinstance(choose_backend("cpu"), CpuBackend)
    assert choose_backend("auto", "cuda").name == choose_backend("auto", "xpu").name == "triton"
    given = ReferenceBackend()
    assert choose_backend(given, "cuda") is given
    with pytest.raises(ConfigError, match="unknown backend 'cudnn'; choose from auto, cpu, cuda, triton"):
        choose_backend("cudnn")
    with pytest.raises(ConfigError, match="the backend 'cpu' reads host memory; the model is on 'cuda'"):
        choose_backend("cpu", "cuda")
    with pytest.raises(UnsupportedError, match="the model is on 'mps'"):
        choose_backend(None, "mps")


def test_a_codec_without_kernels_is_refused_by_name() -> None:
    @dataclass(frozen=True)
    class Foreign(Codec):
        """No codec of the registry."""

        def page_bytes(self, dim: int) -> int:
            return 64 * dim

        def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
            raise AssertionError

        def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
            raise AssertionError

    backend = choose_backend(None, "cuda")
    scheme = Scheme(SCHEMES["int4"].key, Foreign("foreign"))
    assert backend.supports(scheme, SMALL) == "the Triton kernels have no values coded as 'foreign'"
    assert "have no keys coded as 'foreign'" in str(backend.supports(Scheme(scheme.value, scheme.key), SMALL))
    wide = LayerGeometry(1, 1, 320, 64, 1.0)
    assert "head size 320 is over 256" in str(backend.supports(SCHEMES["int8"], wide))


def test_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "triton_compile.py"
    options = ["--dtype", "int4", "--kernels", "decode", "--heads", "4", "1", "--head-dim", "64", "64"]
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *options],
        env={**variables, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["int4", "decode_splits", t] for t in ("sm_80", "sm_90", "gfx942")]
    for row in rows:
        warps, registers, spilled, shared, cycles = map(int, row[3:])
        assert (warps, spilled) == (1, 0)
        assert (cycles > 100) == (row[2] != "gfx942")
        assert 32 < registers <= 512
        assert 0 < shared <= 64 << 10


def test_nothing_imports_triton_before_it_is_chosen() -> None:
    code = (
        "import sys, kvbits.kernels, kvbits.llm, kvbits.hf, kvbits.server.app, kvbits.kernels.cpu\n"
        "print([name for name in sys.modules if name.startswith('kvbits.kernels.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
