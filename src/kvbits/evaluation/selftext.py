"""Text that the model writes itself, to calibrate or measure on where the user has none.

A model's own samples follow the distribution that a Fisher information asks for (data-free quantization does the same:
LLM-QAT, Liu et al., 2023, arXiv:2305.17888).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from kvbits.engine.params import SamplingParams
from kvbits.errors import UnsupportedError
from kvbits.evaluation.compare import REFERENCE, engine_for
from kvbits.models import LoadedModel

KEEP = 256
"""Tokens of each text after which all that is written is kept."""


def write_windows(
    loaded: LoadedModel,
    context: int,
    count: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    texts: int = 1,
    starts: Sequence[str] = (),
    repetition_penalty: float = 1.0,
    begun: Sequence[Sequence[int]] = (),
    keep: Callable[[list[list[int]]], object] = lambda texts: None,
) -> list[list[int]]:
    """``count`` windows of ``context`` token ids, sampled at temperature 1 from the token that begins a text.

    A window holds ``texts`` texts of equal length, one after another: more of them are more starts, in fewer steps.
    Each text goes on from the next of ``starts``, if there are any; a ``repetition_penalty`` over 1 keeps it from
    loops. Where the model ends a text it begins another one. The same ``seed`` gives the same windows. ``progress`` is
    told the tokens written since its last call, ``keep`` now and then all texts: given as ``begun`` they are continued,
    though not with the same tokens. Raises ``UnsupportedError`` when the model cannot write.
    """
    lengths = [context // texts + (i < context % texts) for i in range(texts)] * count
    assert min(lengths) > 0, (context, texts)
    engine = engine_for(loaded, loaded.policy(REFERENCE), len(lengths), max(lengths))
    written = [list(text) for text in begun] or [
        [_first_token(loaded), *(_tokens(loaded, starts[i % len(starts)]) if starts else ())][: max(length - 1, 1)]
        for i, length in enumerate(lengths)
    ]
    for index, (text, length) in enumerate(zip(written, lengths, strict=True)):
        params = SamplingParams(
            max_tokens=max(length - len(text), 1),
            temperature=1.0,
            repetition_penalty=repetition_penalty,
            seed=seed + index + (len(text) if begun else 0),
            ignore_eos=True,
        )
        if len(text) < length or not begun:
            engine.add_request(text, params, request_id=str(index))
    kept = min(map(len, written))
    progress(sum(map(len, written)))
    while engine.has_unfinished():
        before = sum(map(len, written))
        for delta in engine.step():
            if delta.error is not None:
                raise UnsupportedError(f"{loaded.name} cannot write a text to measure on: {delta.error}")
            written[int(delta.request_id)].extend(delta.token_ids)
        progress(sum(map(len, written)) - before)
        if min(map(len, written)) >= min(kept + KEEP, min(lengths)):
            kept = min(map(len, written))
            keep(written)
    parts = [text[:length] for text, length in zip(written, lengths, strict=True)]
    windows = [list(itertools.chain(*parts[i : i + texts])) for i in range(0, len(parts), texts)]
    assert all(len(window) == context for window in windows), [len(window) for window in windows]
    return windows


def _tokens(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids without special tokens, none without a tokenizer."""
    return [] if loaded.tokenizer is None else list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_token(loaded: LoadedModel) -> int:
    """The token that begins a text: the tokenizer's own, else the one that ends a text, else the first."""
    tokenizer = loaded.tokenizer
    for token in () if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
