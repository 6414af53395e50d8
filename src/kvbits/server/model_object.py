"""The model as ``/v1/models`` shows it, and its schema."""

from __future__ import annotations

from typing import Any

from kvbits.server.service import Service

_NUMBER, _COUNT, _TEXT = {"type": "number"}, {"type": "integer"}, {"type": "string"}

_LOSS = {
    "description": "What the KV cache dtype was measured to lose on this model: KL divergence to a 16-bit cache in "
    "nats a token, the upper end of its 95 % interval, the tokens it was measured on, and the text's name (empty: the "
    "model wrote it). Null: never measured.",
    "type": ["object", "null"],
    "properties": {"kl": _NUMBER, "kl_high": _NUMBER, "tokens": _COUNT, "text": _TEXT},
    "required": ["kl", "kl_high", "tokens", "text"],
    "additionalProperties": False,
}
_FIELDS = {
    "id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT, "root": _TEXT,
    "parent": {"type": ["string", "null"]}, "max_model_len": _COUNT, "kv_cache_dtype": _TEXT,
    "kv_cache_bits_per_element": _NUMBER, "kv_cache_bytes_per_token": _NUMBER, "kv_cache_loss": _LOSS,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "type": "object", "properties": _FIELDS, "required": list(_FIELDS), "additionalProperties": False,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "type": "object",
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}},
    "required": ["object", "data"],
}


def answers(schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a route that answers with ``schema`` adds to its description."""
    return {200: {"description": "OK", "content": {"application/json": {"schema": schema}}}}


def model_object(service: Service) -> dict[str, Any]:
    """The one model that is served."""
    engine, loss = service.worker.engine, service.loss
    return {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "kvbits",
        "root": engine.loaded.name,
        "parent": None,
        "max_model_len": engine.max_model_len,
        "kv_cache_dtype": engine.pool.policy.name,
        "kv_cache_bits_per_element": engine.pool.bits_per_element(),
        "kv_cache_bytes_per_token": engine.pool.bytes_per_token(),
        "kv_cache_loss": None
        if loss is None
        else {"kl": loss.kl, "kl_high": loss.high, "tokens": loss.tokens, "text": loss.text},
    }
