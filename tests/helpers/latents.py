"""Tiny models with multi-head latent attention: in an engine, and their answers by transformers alone."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import DynamicCache

from helpers.hybrids import PROMPTS, TOKENS
from helpers.serving import engine_of
from helpers.tiny import tiny_config, tiny_model
from kvbits.engine.engine import Engine
from kvbits.models import LoadedModel
from kvbits.models.load import wrap


class RoundedCache(DynamicCache):
    """transformers' own cache, which has latents and rotary keys, in bfloat16."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rounded = (x.bfloat16().to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


def all_experts(family: str) -> dict[str, int]:
    """What sends every token to all experts: else the last bit of a sum decides which ones, and the logits jump."""
    count = getattr(tiny_config(family), "n_routed_experts", None)
    return {} if "dense" in family or count != 4 else {"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}


@cache
def loaded_of(family: str) -> LoadedModel:
    return wrap(tiny_model(family), None, family)


def latent_engine(family: str, **changes: object) -> Engine:
    options = {"kv_cache_dtype": "bf16", "max_num_batched_tokens": 100, "max_num_seqs": 8, **changes}
    return engine_of(loaded_of(family), **options)


@cache
def expected(family: str) -> list[list[int]]:
    """The greedy answers of transformers' own ``generate``, in float32 with a 16-bit cache."""
    model, answers = tiny_model(family), []
    for tokens in PROMPTS:
        cache = RoundedCache(config=model.config)
        found = model.generate(
            torch.tensor([tokens]), past_key_values=cache, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
        answers.append(found[0, len(tokens) :].tolist())
    assert all(len(set(answer)) > 10 for answer in answers), "the answers repeat themselves"
    return answers


def own_logits(family: str, tokens: list[int], **changes: object) -> Tensor:
    with torch.inference_mode():
        model = tiny_model(family, **changes)
        return model(torch.tensor([tokens]), past_key_values=RoundedCache(config=model.config)).logits[0].float()
