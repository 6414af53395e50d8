"""Calibration text that the model writes itself, where the user has none.

A model's own samples follow the distribution that a Fisher information asks for (data-free quantization does the same:
LLM-QAT, Liu et al., 2023, arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvbits.engine.params import SamplingParams
from kvbits.evaluation.compare import REFERENCE, engine_for
from kvbits.models import LoadedModel

KEEP = 256
"""Tokens of each window after which all that is written is kept."""


def write_windows(
    loaded: LoadedModel,
    context: int,
    count: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    begun: Sequence[Sequence[int]] = (),
    keep: Callable[[list[list[int]]], object] = lambda windows: None,
) -> list[list[int]]:
    """``count`` windows of ``context`` token ids, sampled at temperature 1 from the token that begins a text.

    Where the model ends a text it begins another one in the same window. The same ``seed`` gives the same windows.
    ``progress`` is told the tokens written since its last call, ``keep`` now and then all that is written: given as
    ``begun`` it is continued, though not with the same tokens.
    """
    windows = [list(window) for window in begun] or [[_first_token(loaded)] for _ in range(count)]
    progress(sum(map(len, windows)))
    engine = engine_for(loaded, loaded.policy(REFERENCE), count, context)
    for index, window in enumerate(windows):
        if len(window) < context:
            params = SamplingParams(
                max_tokens=context - len(window), temperature=1.0, seed=seed + index + len(window) - 1, ignore_eos=True
            )
            engine.add_request(window, params, request_id=str(index))
    kept = min(map(len, windows))
    while engine.has_unfinished():
        before = sum(map(len, windows))
        for delta in engine.step():
            assert delta.error is None, delta.error
            windows[int(delta.request_id)].extend(delta.token_ids)
        progress(sum(map(len, windows)) - before)
        if min(map(len, windows)) >= min(kept + KEEP, context):
            kept = min(map(len, windows))
            keep(windows)
    assert all(len(window) == context for window in windows), [len(window) for window in windows]
    return windows


def _first_token(loaded: LoadedModel) -> int:
    """The token that begins a text: the tokenizer's own, else the one that ends a text, else the first."""
    tokenizer = loaded.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
