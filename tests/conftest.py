from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from helpers.backends import BACKENDS

from kvbits.kernels import Backend
from kvbits.user_cache import folder

if TYPE_CHECKING:
    import openai
    from helpers.serving import Running

    from kvbits.models import LoadedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvbits", "long tests")
    group.addoption("--soak-minutes", type=float, default=20.0, help="length of the mixed load (-m soak)")
    group.addoption("--soak-model", default="smollm2-135m", help="model of the mixed load (-m soak)")
    group.addoption("--hostile-requests", type=int, default=10_000, help="malformed and hostile requests (-m soak)")
    group.addoption("--stress-seed", type=int, default=None, help="which run of the engine's stress (-m soak)")
    group.addoption("--stress-method", default=None, help="its method of speculation")
    group.addoption("--stress-family", default=None, help="the shape of its model")
    group.addoption("--page-screenshot", default=None, metavar="FILE", help="write the page's picture (-m browser)")
    group.addoption("--chat-templates", default=None, metavar="DIR", help="chat templates of other projects, *.jinja")


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured losses are kept in a directory of this run; converted tokenizers where they always are."""
    kept, here = folder("tokenizers"), tmp_path_factory.mktemp("cache")
    kept.mkdir(parents=True, exist_ok=True)
    (here / "kvbits").mkdir()
    (here / "kvbits" / "tokenizers").symlink_to(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(here))
        yield


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """``kvbits serve`` called inside a test leaves no handler behind: its stream is closed when the test ends."""
    kept = [logging.getLogger(name) for name in ("kvbits", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in kept]
    yield
    for logger, (logger.handlers, logger.propagate, level) in zip(kept, before, strict=True):
        logger.setLevel(level)


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


@pytest.fixture(scope="module")
def byte_server(byte_loaded: LoadedModel) -> Iterator[Running]:
    from helpers.serving import engine_of, running

    with running(engine_of(byte_loaded)) as found:
        yield found


@pytest.fixture
def server(byte_server: Running) -> Iterator[Running]:
    """A server of the model whose tokens are bytes, one for a file; no test may leave a page behind."""
    yield byte_server
    byte_server.idle()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as found:
        yield found
