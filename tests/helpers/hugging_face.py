"""transformers' own attention and caches, as an independent check of a 16-bit or coded cache."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from helpers.tiny import VOCAB, tiny_model
from kvbits.codecs import parse_policy
from kvbits.config import PAGE_TOKENS

EAGER = "eager-bf16-kv"


def eager_with_bf16_keys(module, query, key, value, attention_mask, **kwargs):
    """The family's own eager attention; keys and values are rounded as a 16-bit cache would."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key.bfloat16().float(), value.bfloat16().float(), attention_mask, **kwargs)


def hugging_face_model(family: str, **changes: object) -> torch.nn.Module:
    """The tiny model of ``family`` on transformers' own attention and masks."""
    AttentionInterface.register(EAGER, eager_with_bf16_keys)
    AttentionMaskInterface.register(EAGER, eager_mask)
    model = tiny_model(family, **changes)
    model.set_attn_implementation(EAGER)
    return model


def left_padded(lengths: list[int], seed: int = 1) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded on the left."""
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    ids = torch.randint(4, VOCAB, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids * mask, "attention_mask": mask}


class RoundingCache(DynamicCache):
    """transformers' own cache; what enters it is rounded to bfloat16."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(key_states.bfloat16().float(), value_states.bfloat16().float(), layer_idx)


def coded_page_logits(model: torch.nn.Module, dtype: str, tokens: list[int]) -> Tensor:
    """Token by token with transformers' own cache, in which each full page is replaced by its decoded code."""
    model.set_attn_implementation("eager")
    scheme = parse_policy(dtype, 1).layers[0]
    cache, logits = RoundingCache(), []
    with torch.inference_mode():
        for at, token in enumerate(tokens, start=1):
            logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
            if at % PAGE_TOKENS == 0:
                for layer in cache.layers:
                    for rows, codec, side in ((layer.keys, scheme.key, "key"), (layer.values, scheme.value, "value")):
                        page = rows[0, :, -PAGE_TOKENS:]
                        page.copy_(codec.decode(codec.encode(page, side), page.shape[-1], side))
    return torch.stack(logits)
