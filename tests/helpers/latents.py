"""Tiny models with multi-head latent attention: in an engine, and their answers by transformers alone."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
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


SEEDS = {"deepseek_v2-dense": 3, "youtu": 3}
"""Of models whose two likeliest tokens are as good as equal somewhere with seed 0."""

CLEAR = 5e-4
"""Between two logits; a last bit that tips the rounding of a latent moves one by up to 3e-4."""


@cache
def loaded_of(family: str) -> LoadedModel:
    return wrap(tiny_model(family, SEEDS.get(family, 0)), None, family)


def latent_engine(family: str, **changes: object) -> Engine:
    options = {"kv_cache_dtype": "bf16", "max_num_batched_tokens": 100, "max_num_seqs": 8, **changes}
    return engine_of(loaded_of(family), **options)


@cache
def expected(family: str) -> list[list[int]]:
    """The greedy answers of transformers' own ``generate``, in float32 with a 16-bit cache."""
    model, answers = tiny_model(family, SEEDS.get(family, 0)), []
    for tokens in PROMPTS:
        cache = RoundedCache(config=model.config)
        found = model.generate(
            torch.tensor([tokens]), past_key_values=cache, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        answers.append(found.sequences[0, len(tokens) :].tolist())
        best = torch.cat(found.scores).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > CLEAR, f"{family}: a last bit decides, so take another seed"
    assert all(len(set(answer)) > 10 for answer in answers), "the answers repeat themselves"
    return answers


def own_logits(family: str, tokens: list[int], **changes: object) -> Tensor:
    with torch.inference_mode():
        model = tiny_model(family, **changes)
        return model(torch.tensor([tokens]), past_key_values=RoundedCache(config=model.config)).logits[0].float()


class Choices:
    """The experts that a model's routers choose for token after token: noted, or given once more."""

    def __init__(self, model: nn.Module) -> None:
        gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        self._noted: dict[nn.Module, list[Tensor]] = {gate: [] for gate in gates}
        self._given: dict[nn.Module, Tensor] = {}
        for gate in gates:
            gate.register_forward_hook(self._choose)

    def take(self) -> list[Tensor]:
        """What was noted since, ``int64 [tokens, experts]`` of each router in order of the numbers."""
        self._last = {gate: torch.cat(parts) for gate, parts in self._noted.items()}
        self._noted = {gate: [] for gate in self._noted}
        return [chosen.sort(dim=1).values for chosen in self._last.values()]

    def give(self) -> None:
        """From now on the choices are those that were taken."""
        self._given = self._last

    def _choose(self, gate: nn.Module, _: object, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = out
        if gate in self._given:
            at = sum(map(len, self._noted[gate]))
            chosen = self._given[gate][at : at + len(chosen)]
            scores = logits.sigmoid() if hasattr(gate, "e_score_correction_bias") else logits.softmax(-1)
            weights = scores.gather(1, chosen)
            if getattr(gate, "norm_topk_prob", False):
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            weights = weights * gate.routed_scaling_factor
        self._noted[gate].append(chosen)
        return logits, weights, chosen
