"""What the host does for a GPU, without one: which tables it makes, which GPU it launches on, what it says."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kvbits.codecs import parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.engine.graphs import graphs_for
from kvbits.engine.model_runner import ModelRunner
from kvbits.errors import UnsupportedError
from kvbits.kernels import Backend, BatchLayout, SequencePages, choose_backend
from kvbits.kernels.cuda import backend as cuda_backend
from kvbits.kernels.cuda import driver, nvrtc
from kvbits.kernels.cuda.backend import CudaBackend
from kvbits.kernels.cuda.variant import Variant
from kvbits.kernels.triton import launch, pieces, tables
from kvbits.kernels.triton.backend import TritonBackend
from kvbits.pool import PagedPool

LAYER = LayerGeometry(4, 2, 64, 64, 64**-0.5)


class Nothing:
    """Launches that do nothing, of both kinds of kernels."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return

    def prepare(self, variant: Variant) -> None:
        return


def cuda_without() -> CudaBackend:
    backend = CudaBackend("cuda", False, Nothing(), 4)
    backend._launch = Nothing()
    return backend


@pytest.mark.parametrize("counts", [(1, 1), (1, 100), (100,)])
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_tables_are_made_once_and_only_those_that_kernels_read(
    monkeypatch: pytest.MonkeyPatch, kernels: str, counts: tuple[int, ...]
) -> None:
    """Decoding sequences, a prompt, or both, in three layers of bfloat16."""
    made: list[str] = []
    for module, name in ((tables, "_tiles"), (tables, "_arrays"), (pieces, "_pieces")):
        own = getattr(module, name)
        label = "pieces" if name == "_pieces" else name
        monkeypatch.setattr(module, name, lambda *a, own=own, label=label: made.append(label) or own(*a))
    backend: Backend = cuda_without() if kernels == "cuda" else TritonBackend("cuda", Nothing())
    pool = PagedPool.smallest(ModelGeometry("test", (LAYER,) * 3, 1024, 16), parse_policy("int4", 3))
    own = range(pool.layout.open.frames)
    batch = BatchLayout.of([SequencePages(70, n, range((70 + n) // 64), own, own) for n in counts])
    query, key, value = (torch.zeros(batch.num_rows, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    for view in pool.layers:
        backend.forward(view, batch, query, key, value, None)
    assert sorted(made) == ["_arrays", *(["_tiles"] if kernels == "triton" else []), "pieces"]


class Current:
    """Stands for ``torch.cuda.device``: which GPU is the current one."""

    now: torch.device | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        Current.now = self._device

    def __exit__(self, *_: object) -> None:
        Current.now = None


def test_kernels_run_where_their_arguments_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, whatever its arguments are on."""
    seen = []
    kernel = {(1,): lambda *_, **__: seen.append(Current.now)}
    monkeypatch.setattr(torch.cuda, "device", Current)
    for device in ("cuda:1", "cuda:0", "cpu"):
        launch.run(kernel, (1,), ((SimpleNamespace(device=torch.device(device)), 1), 2), {})
    assert seen == [torch.device("cuda:1"), torch.device("cuda:0"), None]


def test_steps_run_where_the_pool_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings, and the streams that they are made on, belong to the current GPU."""
    monkeypatch.setattr(torch.cuda, "device", Current)
    seen: list[torch.device | None] = []
    graphs = SimpleNamespace(
        run=lambda batch: (seen.append(Current.now), torch.zeros(1))[1],
        warm_up=lambda sequences, report: seen.append(Current.now),
    )
    pool = SimpleNamespace(buffer=SimpleNamespace(device=torch.device("cuda:1")))
    runner = ModelRunner(SimpleNamespace(), pool, SimpleNamespace(take_copies=list), SimpleNamespace(graphs=False))
    runner.graphs = graphs
    runner.run(SimpleNamespace())
    monkeypatch.setattr(runner, "teacher_forced", lambda *_: ())
    runner.warm_up(0, 1, 1, 1, lambda line: None)
    assert seen == [torch.device("cuda:1")] * 2


def test_a_backend_is_made_for_the_gpu_that_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []

    def make(device: torch.device) -> SimpleNamespace:
        made.append(device)
        return SimpleNamespace(multiprocessors=4)

    for module in (driver, cuda_backend):
        monkeypatch.setattr(module, "refusal", lambda device: None)
    monkeypatch.setattr(cuda_backend, "Driver", make)
    for choice in ("auto", "cuda"):
        assert choose_backend(choice, "cuda:1").device == torch.device("cuda:1")
    assert made == [torch.device("cuda:1")] * 2
    assert choose_backend("triton", "cuda:1").device == torch.device("cuda:1")


def test_steps_with_recurrent_states_are_no_graphs() -> None:
    """Their slots change from step to step, and a recording has none."""
    assert graphs_for(SimpleNamespace(), SimpleNamespace(states=object()), SimpleNamespace(graphs=True)) is None


@pytest.mark.parametrize(("own", "first"), [("12.8", "12"), ("13.0", "13"), (None, "13")])
def test_the_compiler_of_torchs_own_cuda_comes_first(
    monkeypatch: pytest.MonkeyPatch, own: str | None, first: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", own)
    assert nvrtc._candidates()[0].endswith(f"libnvrtc.so.{first}")


def test_without_a_home_kernels_are_compiled_at_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_source", lambda arch, defines: b"code")
    assert nvrtc.compiled("sm_90", ()) == b"code"


def test_without_a_driver_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver._driver.cache_clear()
    assert driver.refusal(torch.device("cuda")) == (
        "NVIDIA's driver cannot be loaded: libcuda.so.1: cannot open shared object file"
    )


def test_code_that_the_driver_refuses_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a driver does that is older than the compiler."""

    def name_of(result: int, to: Any) -> None:
        to._obj.value = b"CUDA_ERROR_NO_BINARY_FOR_GPU"

    library = SimpleNamespace(cuModuleLoadData=lambda *_: 209, cuGetErrorName=name_of)
    monkeypatch.setattr(driver, "_driver", lambda: library)
    monkeypatch.setattr(driver, "compiled", lambda arch, defines: b"code")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "device", Current)
    made = driver.Driver.__new__(driver.Driver)
    made._device, made.arch, made._functions = torch.device("cuda:1"), "sm_90", {}
    with pytest.raises(UnsupportedError, match=r"NO_BINARY_FOR_GPU \(209\); choose the backend 'triton'"):
        made.prepare(replace(Variant(4, 4, 128, 1, False)))
