"""From what was asked to a policy: the dtype that was named, or the one of the fewest bits that loses little enough."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbits.auto import store
from kvbits.auto.ladder import identity, is_reference, rungs
from kvbits.auto.loss import OWN_TEXT, Loss, known_line, nats
from kvbits.auto.measure import measure, passes
from kvbits.auto.owntext import STARTS, own_windows
from kvbits.auto.wanted import Wanted
from kvbits.codecs import Policy
from kvbits.errors import ConfigError
from kvbits.evaluation.compare import REFERENCE
from kvbits.kernels import Backend, choose_backend
from kvbits.models import LoadedModel

CONTEXT = 640
"""Tokens of a window that is measured on (the model's context where that is shorter)."""

WINDOWS = 2
Bar = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
"""A progress bar: from a total in tokens and a label to a context that gives the function to advance it."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A policy, what it was measured to lose (``None``: never measured), and one line for people.

    ``measured``: the ladder was measured just now.
    """

    policy: Policy
    loss: Loss | None
    line: str
    measured: bool = False


def choose(
    loaded: LoadedModel,
    wanted: Wanted,
    bar: Bar,
    note: Note = lambda line: None,
    backend: Backend | str | None = None,
) -> Choice:
    """The policy for ``wanted``.

    A dtype that is named is taken, with what is known of it. For ``auto`` the ladder's losses are read from the user's
    cache directory, or measured (``bar`` shows it) and written there; ``note`` is told what hinders either. ``backend``
    is as for the engine. Raises ``ConfigError`` for a dtype that cannot be and for a text that is too short,
    ``UnsupportedError`` for a model that cannot be measured.
    """
    return _automatic(loaded, wanted, bar, note, backend) if wanted.auto else named(loaded, wanted.dtype)


def named(loaded: LoadedModel, dtype: str | Policy) -> Choice:
    """A dtype that was named, with what is known of it. Raises ``ConfigError`` for one that cannot be."""
    policy = loaded.policy(dtype)
    loss = _nothing(loaded) if is_reference(policy) else store.find(loaded.fingerprint, identity(policy))
    return Choice(policy, loss, known_line(policy.label, loss))


def fewest_bits(ladder: Sequence[Policy], losses: Sequence[Loss], bound: float) -> Policy | None:
    """The first of ``ladder`` (fewest bits first) whose KL is certainly not over ``bound``: its whole interval."""
    by_dtype = {loss.dtype: loss for loss in losses}
    return next((rung for rung in ladder if by_dtype[identity(rung)].high <= bound), None)


def _automatic(loaded: LoadedModel, wanted: Wanted, bar: Bar, note: Note, backend: Backend | str | None) -> Choice:
    kernels = choose_backend(backend, str(loaded.device))
    ladder = rungs(loaded, kernels)
    tokens = None if wanted.content is None else _tokens(loaded, wanted.content)
    conditions = _conditions(loaded, ladder, kernels, tokens)
    losses = _stored(loaded, ladder, conditions, note)
    measured = losses is None
    if losses is None:
        losses = _measure(loaded, ladder, wanted, tokens, bar, backend)
        _keep(loaded, conditions, losses, note)
    chosen = fewest_bits(ladder, losses, wanted.bound)
    policy = loaded.policy(REFERENCE) if chosen is None else chosen
    by_dtype = {loss.dtype: loss for loss in losses}
    loss = _nothing(loaded) if chosen is None else by_dtype[identity(policy)]
    smaller = ladder if chosen is None else ladder[: ladder.index(chosen)]
    over = [f"{rung.label} {nats(by_dtype[identity(rung)].kl)}" for rung in smaller]
    return Choice(policy, loss, _line(loaded, policy, loss, over, wanted.bound), measured)


def _conditions(
    loaded: LoadedModel, ladder: Sequence[Policy], kernels: Backend, tokens: Sequence[int] | None
) -> dict[str, Any]:
    """All that decides what is measured on a model, but for the bound."""
    text = ["own", *STARTS] if tokens is None else list(tokens)
    return {
        "ladder": [rung.name for rung in ladder],
        "text": hashlib.sha256(json.dumps(text).encode()).hexdigest(),
        "windows": [WINDOWS, _context(loaded)],
        "arithmetic": str(loaded.model.dtype),
        "weights": loaded.weights,
        "backend": kernels.name,
    }


def _context(loaded: LoadedModel) -> int:
    return min(CONTEXT, loaded.geometry.max_position)


def _tokens(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of a text without special tokens. Raises ``ConfigError`` when they are too few."""
    if loaded.tokenizer is None:
        raise ConfigError(f"{loaded.name} has no tokenizer to read --text with; leave it out")
    tokens = list(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    needed = WINDOWS * _context(loaded)
    if len(tokens) < needed:
        raise ConfigError(f"the text of --text has {len(tokens)} tokens; {needed} are needed to measure on")
    return tokens


def _stored(loaded: LoadedModel, ladder: Sequence[Policy], conditions: dict[str, Any], note: Note) -> list[Loss] | None:
    try:
        return store.load(loaded.fingerprint, conditions, [identity(rung) for rung in ladder])
    except store.Damaged as error:
        note(f"{error}; it is measured again")
        return None


def _measure(
    loaded: LoadedModel,
    ladder: Sequence[Policy],
    wanted: Wanted,
    tokens: Sequence[int] | None,
    bar: Bar,
    backend: Backend | str | None,
) -> list[Loss]:
    context = _context(loaded)
    if tokens is None:
        with bar(WINDOWS * context, f"{loaded.name} writes a text to measure cache dtypes on") as advance:
            windows = own_windows(loaded, context, WINDOWS, advance)
    else:
        # Spread over the text, which may change its subject.
        step = len(tokens) // WINDOWS
        windows = [list(tokens[i * step : i * step + context]) for i in range(WINDOWS)]
    name = OWN_TEXT if wanted.text is None else Path(wanted.text).name
    total = passes(loaded, WINDOWS, len(ladder)) * context
    with bar(total, "measuring " + ", ".join(rung.label for rung in ladder)) as advance:
        return measure(
            loaded, ladder, windows, name, wanted.bound, lambda: choose_backend(backend, str(loaded.device)), advance
        )


def _keep(loaded: LoadedModel, conditions: dict[str, Any], losses: Sequence[Loss], note: Note) -> None:
    try:
        store.save(loaded.fingerprint, loaded.name, conditions, losses)
    except OSError as error:
        note(f"cannot keep what was measured ({error}); the next start measures again")


def _nothing(loaded: LoadedModel) -> Loss:
    """That of the 16-bit cache."""
    arithmetic = str(loaded.model.dtype).removeprefix("torch.")
    return Loss(REFERENCE, 0.0, 0.0, 0.0, 0, 0, OWN_TEXT, arithmetic)


def _line(loaded: LoadedModel, policy: Policy, loss: Loss, over: Sequence[str], bound: float) -> str:
    head = f"auto takes {policy.label} ({policy.bits_per_element(loaded.geometry):.2f} bits per element)"
    rest = f"; fewer bits were over it: {', '.join(over)}" if over else ""
    if not loss.tokens:
        return f"{head}: no dtype of fewer bits stays under the bound of KL {bound:g}{rest}"
    return (
        f"{head}: KL {nats(loss.kl)} (at most {nats(loss.high)}), measured on {loss.where}; the bound is "
        f"{bound:g}{rest}"
    )
