"""What the questions, texts and tool calls of one dtype say beside the 16-bit cache's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kvbits.evaluation.arithmetic import Solved
from kvbits.evaluation.bootstrap import Interval, interval
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.generation import Written
from kvbits.evaluation.layers import LayerError
from kvbits.evaluation.paired import mcnemar
from kvbits.evaluation.probes import Answered
from kvbits.evaluation.toolcalls import Called
from kvbits.evaluation.verdict import Measure

_BLOCK = 64
"""Neighbouring tokens whose losses count as one group."""

Finding = tuple[dict[str, Any], list[Measure]]
"""Figures for the report in plain types, and what the verdict is made from."""


def of_text(record: Fidelity, window_tokens: int) -> tuple[Interval, list[Measure]]:
    """KL and perplexity with intervals over blocks of 64 tokens; ``window_tokens`` were scored in each window."""
    kl, nll, reference = (np.concatenate(x) for x in (record.kl, record.nll, record.nll_reference))
    blocks = [(i // window_tokens, i % window_tokens // _BLOCK) for i in range(len(kl))]
    loss = interval(kl, blocks)
    change = interval(nll - reference, blocks)
    mean, low, high = (math.expm1(x) for x in (change.mean, change.low, change.high))
    share = Interval(mean, low, high, change.items, change.groups)
    return loss, [Measure("kl", "text", loss), Measure("perplexity", "text", share)]


def of_layers(errors: Sequence[LayerError]) -> Finding:
    """Error by layer, and how far keys and values read back too large or too small; the latter is judged."""
    figures: dict[str, Any] = {
        "layers": [asdict(e) for e in errors],
        "error_mean": float(np.mean([e.error for e in errors])),
        "error_max": max(e.error for e in errors),
    }
    measures = []
    for side in ("key", "value"):
        off = interval([getattr(e, f"{side}_off") for e in errors], range(len(errors)))
        figures[f"{side}_off_mean"] = off.mean
        measures.append(Measure("gain", f"{side}s", off))
    return figures, measures


def of_task(task: str, own: Sequence[Answered], reference: Sequence[Answered]) -> Finding:
    """Right answers and their log-probability, over all and by depth and length."""
    assert len(own) == len(reference) > 0, (task, len(own), len(reference))
    documents = [a.document for a in own]
    lost = [int(r.exact) - int(a.exact) for a, r in zip(own, reference, strict=True)]
    nats = [(r.logprob - a.logprob) / a.tokens for a, r in zip(own, reference, strict=True)]
    exact, logprob = interval(lost, documents), interval(nats, documents)
    figures = {
        "questions": len(own),
        "documents": len(set(documents)),
        "exact": float(np.mean([a.exact for a in own])),
        "exact_16bit": float(np.mean([r.exact for r in reference])),
        "exact_lost": exact.as_json(),
        "logprob": float(np.mean([a.logprob for a in own])),
        "logprob_16bit": float(np.mean([r.logprob for r in reference])),
        "logprob_lost_per_token": logprob.as_json(),
        "cells": _cells(own, reference),
    }
    return figures, [Measure("exact", task, exact), Measure("logprob", task, logprob)]


def _cells(own: Sequence[Answered], reference: Sequence[Answered]) -> list[dict[str, Any]]:
    """Means over the questions with the same labels."""
    groups: dict[tuple[tuple[str, Any], ...], list[tuple[Answered, Answered]]] = {}
    for a, r in zip(own, reference, strict=True):
        groups.setdefault(tuple(sorted(a.labels.items())), []).append((a, r))
    return [
        {
            **dict(labels),
            "questions": len(pairs),
            "exact": float(np.mean([a.exact for a, _ in pairs])),
            "exact_16bit": float(np.mean([r.exact for _, r in pairs])),
            "logprob_per_token": float(np.mean([a.logprob / a.tokens for a, _ in pairs])),
            "logprob_per_token_16bit": float(np.mean([r.logprob / r.tokens for _, r in pairs])),
        }
        for labels, pairs in groups.items()
    ]


def of_texts(own: Sequence[Written], reference: Sequence[Written]) -> Finding:
    """Repetition, loops and likelihood of free texts; only drawn ones are judged: small models loop greedily."""
    facts: dict[str, list[dict[str, Any]]] = {"greedy": [], "drawn": []}
    plain: dict[str, list[dict[str, Any]]] = {"greedy": [], "drawn": []}
    for a, r in zip(own, reference, strict=True):
        assert (a.prompt, a.mode) == (r.prompt, r.mode), (a.prompt, a.mode, r.prompt, r.mode)
        facts[a.mode].append(a.facts(r))
        plain[a.mode].append(r.facts(r))
    figures = {mode: _means(rows) | {"new_tokens": len(own[0].tokens)} for mode, rows in facts.items()}
    figures["drawn_16bit"], figures["greedy_16bit"] = _means(plain["drawn"]), _means(plain["greedy"])
    prompts = range(len(facts["drawn"]))

    def loss(name: str) -> Interval:
        return interval([a[name] - r[name] for a, r in zip(facts["drawn"], plain["drawn"], strict=True)], prompts)

    return figures, [
        Measure("repetition", "drawn text", loss("repeated_4grams")),
        Measure("self-perplexity", "drawn text", loss("nll")),
    ]


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("repeated_4grams", "distinct_1", "distinct_2", "same_tokens")
    found: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in names}
    found["same_tokens_median"] = float(np.median([row["same_tokens"] for row in rows]))
    found["loops"] = float(np.mean([row["loop"] > 0 for row in rows]))
    found["self_perplexity"] = float(np.exp(np.mean([row["nll"] for row in rows])))
    return found | {"texts": len(rows)}


def of_calls(own: Sequence[Called], reference: Sequence[Called]) -> Finding:
    """Of the calls that are valid at 16 bit: how many still are, and how many are the same."""
    pairs = [(a, r) for a, r in zip(own, reference, strict=True) if r.call is not None]
    figures: dict[str, Any] = {
        "questions": len(own),
        "valid": sum(a.call is not None for a in own),
        "valid_16bit": len(pairs),
        **mcnemar([a.right for a in own], [r.right for r in reference]),
        "still_valid": sum(a.call is not None for a, _ in pairs),
        "same_name": sum(a.call is not None and r.call is not None and a.call[0] == r.call[0] for a, r in pairs),
        "same": sum(a.call == r.call for a, r in pairs),
    }
    if not pairs:  # a model that calls no tool has nothing to lose
        return figures, []
    groups = range(len(pairs))
    valid = interval([float(a.call is None) for a, _ in pairs], groups)
    changed = interval([float(a.call != r.call) for a, r in pairs], groups)
    return figures, [Measure("calls-valid", "tools", valid), Measure("calls-changed", "tools", changed)]


def of_problems(own: Sequence[Solved], reference: Sequence[Solved]) -> Finding:
    """Right answers, and McNemar's test of those that changed."""
    right, right_16bit = [a.right for a in own], [r.right for r in reference]
    lost = interval([float(r) - float(a) for a, r in zip(right, right_16bit, strict=True)], range(len(own)))
    figures = {
        "questions": len(own),
        **mcnemar(right, right_16bit),
        "same_number": sum(a.number == r.number for a, r in zip(own, reference, strict=True)),
        "same_text": sum(a.text == r.text for a, r in zip(own, reference, strict=True)),
    }
    return figures, [Measure("exact", "gsm8k", lost)]
