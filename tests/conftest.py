from __future__ import annotations

import pytest
from helpers.backends import BACKENDS

from kvbits.kernels import Backend


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()
