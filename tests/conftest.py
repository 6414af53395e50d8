from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from helpers.backends import BACKENDS

from kvbits.kernels import Backend

if TYPE_CHECKING:
    from kvbits.models import LoadedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvbits", "long tests")
    group.addoption("--soak-minutes", type=float, default=20.0, help="length of the mixed load (-m soak)")
    group.addoption("--soak-model", default="smollm2-135m", help="model of the mixed load (-m soak)")
    group.addoption("--hostile-requests", type=int, default=10_000, help="malformed and hostile requests (-m soak)")
    group.addoption("--stress-seed", type=int, default=None, help="which run of the engine's stress (-m soak)")
    group.addoption("--stress-method", default=None, help="its method of speculation")
    group.addoption("--page-screenshot", default=None, metavar="FILE", help="write the page's picture (-m browser)")


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(scope="module")
def byte_loaded() -> Iterator[LoadedModel]:
    """The tiny model whose tokens are bytes, on one thread: it has nothing to share between more."""
    import torch
    from helpers.serving import byte_model

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield byte_model()
    torch.set_num_threads(before)
