"""The policy of an engine whose layers are there."""

from __future__ import annotations

from typing import Any

from kvbits.codecs import Policy, policy_of
from kvbits.config import POLICY_PREFIX, LayerGeometry, ModelGeometry
from kvbits.errors import UnsupportedError


def read_policy(text: str, layers: tuple[LayerGeometry, ...], config: Any) -> Policy:
    """Read ``text`` for a model with ``layers``; a calibrated one must be of this very checkpoint.

    Raises ``ConfigError`` for what cannot be read or is another model's.
    """
    model = config.model_config
    geometry = ModelGeometry(model.model, layers, model.max_model_len, model.get_vocab_size())
    if not text.startswith(POLICY_PREFIX):
        return policy_of(text, geometry, None)
    if config.parallel_config.tensor_parallel_size > 1:
        raise UnsupportedError("a calibrated policy's rounding is for all heads; run with --tensor-parallel-size 1")
    from kvbits.models.fingerprint import fingerprint_of

    return policy_of(text, geometry, fingerprint_of(model.model, model.trust_remote_code))
