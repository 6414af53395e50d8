"""Calibration text that the model writes itself, where the user has none.

A model's own samples follow the distribution that a Fisher information asks for (data-free quantization does the same:
LLM-QAT, Liu et al., 2023, arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable

from kvbits.engine.params import SamplingParams
from kvbits.evaluation.compare import REFERENCE, engine_for
from kvbits.models import LoadedModel


def write_windows(
    loaded: LoadedModel,
    context: int,
    count: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """``count`` windows of ``context`` token ids, sampled at temperature 1 from the token that begins a text.

    Where the model ends a text it begins another one in the same window. The same ``seed`` gives the same windows.
    ``progress`` is told the tokens written since its last call.
    """
    engine = engine_for(loaded, loaded.policy(REFERENCE), count, context)
    begin = _first_token(loaded)
    written: dict[str, list[int]] = {}
    for index in range(count):
        params = SamplingParams(max_tokens=context - 1, temperature=1.0, seed=seed + index, ignore_eos=True)
        written[engine.add_request([begin], params, request_id=str(index))] = [begin]
    while engine.has_unfinished():
        before = sum(map(len, written.values()))
        for delta in engine.step():
            assert delta.error is None, delta.error
            written[delta.request_id].extend(delta.token_ids)
        progress(sum(map(len, written.values())) - before)
    windows = list(written.values())
    assert all(len(window) == context for window in windows), [len(window) for window in windows]
    return windows


def _first_token(loaded: LoadedModel) -> int:
    """The token that begins a text: the tokenizer's own, else the one that ends a text, else the first."""
    tokenizer = loaded.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
