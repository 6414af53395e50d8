"""What stands for a device's graphs on a CPU: it runs the step again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvbits.engine import model_runner
from kvbits.engine.graphs import DecodeGraphs
from kvbits.kernels import Backend
from kvbits.models import LoadedModel
from kvbits.pool import PagedPool


class Rerun:
    """Records by remembering, replays by running again; the result stays where it was."""

    replays = 0

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        self._step = step
        self._out = step()
        self._out.fill_(torch.nan)  # what a graph records it has not run
        return self._out

    def replay(self) -> None:
        Rerun.replays += 1
        self._out.copy_(self._step())


class Watched(Rerun):
    """Records without remembering the step, as a device does: only the addresses of what it read."""

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        step()
        with Reads() as reads:
            self._out = step()
        self.read = reads.from_outside
        return self._out


class Reads(TorchDispatchMode):
    """Collects the memory that operators read and none of them made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: set[int] = set()
        self._kept: list[Any] = []
        self.from_outside: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._made:
                self.from_outside.append(StorageWeakRef(x.untyped_storage()))
        out = func(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]
        outside = {ref.cdata for ref in self.from_outside}
        self._made.update(x._cdata for x in made if x._cdata not in outside)
        self._kept += made  # an address means one storage as long as this lives
        return out


def recording(monkeypatch: pytest.MonkeyPatch, graph: type[Rerun]) -> list[DecodeGraphs]:
    """Engines made from now on record their steps; what they recorded."""
    made: list[DecodeGraphs] = []

    def graphs_for(loaded: LoadedModel, pool: PagedPool, backend: Backend) -> DecodeGraphs:
        made.append(DecodeGraphs(loaded, pool, backend, graph))
        return made[-1]

    Rerun.replays = 0
    monkeypatch.setattr(model_runner, "graphs_for", graphs_for)
    return made


def check_reads(graphs: DecodeGraphs, sizes: list[int]) -> None:
    """Recordings of ``sizes`` sequences by :class:`Watched`: all that they read from outside is still there."""
    gc.collect()
    known = graphs._known.values()
    assert [len(r.layout.counts) for r in known] == sizes
    for r in known:
        assert len(r.graph.read) > 40
        assert not any(ref.expired() for ref in r.graph.read)
