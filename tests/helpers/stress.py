"""A randomized workload of the engine: everything that a user may ask for, mixed, with faults put in.

One number decides everything, so what fails can be replayed. Each answer is compared with the one that the same request
gets alone: no speculation, no prefix cache, a large pool. The model's rows do not depend on the rows beside them, so
tokens, texts and log-probabilities must be equal to the last bit.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import torch

from helpers.asks import Ask, Setup, alone, grammars, kinds, whole
from helpers.mischief import BadGrammar, Mischief, Trouble
from helpers.serving import CONTEXT
from helpers.tiny import HYBRIDS
from kvbits.config import PAGE_TOKENS
from kvbits.engine.params import SamplingParams
from kvbits.engine.request import Request
from kvbits.engine.speculation import by_model
from kvbits.engine.speculation.by_model import DraftModelProposer
from kvbits.engine.transfer import PageBundle, export_pages, import_pages
from kvbits.errors import CacheError, ConfigError, OutOfPages, RequestError

_PATIENCE = 3000


class Fault(AssertionError):
    """What went wrong, and how to see it again."""


class Unexpected(logging.Handler):
    """Errors that the engine survived, other than those that were put in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, Trouble):
            self.found.append(error)


class Stress:
    """One run; ``method`` and ``family`` go by the seed if they are not given."""

    def __init__(self, seed: int, method: str | None = None, family: str | None = None) -> None:
        self.seed = seed
        chosen = [k for k in kinds() if method in (None, k[0]) and family in (None, k[1])]
        self.method, self.family = chosen[seed % len(chosen)]
        self.rng = random.Random(f"{seed} {self.method}")
        self.setup = Setup.draw(self.rng, self.method, self.family)
        self.engine = self.setup.engine()
        self.mischief = Mischief(self.engine, self.rng) if self.setup.faults else None
        self.bases = [self._base() for _ in range(4)]
        self.asks: list[Ask] = []
        self.imported: dict[str, list[list[int]]] = {}
        self.count: Counter[str] = Counter()
        self.steps = 0
        self._left = self.rng.choice((10, 16, 30))
        self._quiet = 0

    def run(self) -> Counter[str]:
        """Raises :class:`Fault`. Returns what was done how often."""
        clock = itertools.count()
        log, survived = logging.getLogger("kvbits"), Unexpected()
        log.addHandler(survived)
        log.propagate = False
        try:
            with patch.object(by_model, "time", SimpleNamespace(perf_counter=lambda: next(clock) * 1e-4)):
                self._drive()
                self._compare()
            if survived.found:
                raise survived.found[0]
        except Exception as error:
            method = self.method
            raise Fault(
                f"{type(error).__name__}: {error}\nstep {self.steps} of {self.setup}\nagain: pytest -m soak "
                f"tests/test_engine_stress.py -k replay --stress-seed {self.seed} --stress-method {method} "
                f"--stress-family {self.family}"
            ) from error
        finally:
            log.propagate = True
            log.removeHandler(survived)
        engine = self.engine
        self.count["steps"] = self.steps
        self.count["preemptions"] = engine.stats.preemptions
        self.count["guessed tokens"] = engine.stats.speculation.draft_tokens
        self.count["tokens kept of guesses"] = engine.stats.speculation.accepted_tokens
        self.count["failed guesses"] = engine.stats.speculation.failures
        tier = engine.pages.stats().tier
        self.count["pages from the second tier"] = 0 if tier is None else tier.restored
        if self.mischief is not None:
            self.count.update({f"faults: {kind}": n for kind, n in self.mischief.count.items()})
        return self.count

    # What arrives

    def _base(self) -> list[int]:
        rng = self.rng
        if rng.random() < 0.5:
            return (rng.choices(range(3, 259), k=rng.randint(3, 40)) * 150)[:CONTEXT]
        return rng.choices(range(3, 259), k=CONTEXT)

    def _prompt(self) -> list[int]:
        rng = self.rng
        finished = [a for a in self.asks if a.done and a.fate is None and a.params.n == 1]
        if finished and rng.random() < 0.2:
            earlier = rng.choice(finished)
            start = [*earlier.prompt, *whole(earlier.deltas[0])["tokens"]]
        else:
            start = rng.choice(self.bases)[: rng.choice((0, 1, 40, 63, 64, 65, 128, 129, 192, 256, 257, 300))]
        end = rng.choices(range(3, 259), k=rng.choice((0, 0, 1, 1, 2, 30, 63, 70)))
        prompt = [*start, *end] or [7]
        # Often the last chunk is one token, or nearly.
        chunks = (len(prompt) - 1) // self.setup.budget * self.setup.budget
        return prompt[: chunks + rng.choice((1, 1, 2, CONTEXT, CONTEXT))]

    def _params(self) -> SamplingParams:
        rng = self.rng
        options: dict[str, object] = {
            "max_tokens": rng.choice((1, 2, 5, 20, 70, 130, 130)),
            "temperature": rng.choice((0.0, 0.0, 0.3, 0.9)),
            "seed": rng.randrange(1000),
            "ignore_eos": rng.random() < 0.7,
            "n": rng.choice((1, 1, 1, 1, 2, 3)),
        }
        for name, value in {
            "top_p": rng.choice((0.5, 0.95)), "top_k": rng.choice((1, 5, 50)), "min_p": 0.1,
            "logprobs": rng.choice((0, 2)),
            "stop": [chr(rng.randrange(97, 123)) for _ in range(3)], "stop_token_ids": (rng.randrange(3, 259),),
            "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2,
            "logit_bias": {rng.randrange(3, 259): rng.choice((3.0, 100.0))}, "grammar": rng.choice(grammars()),
        }.items():  # fmt: skip
            if rng.random() < 0.15:
                options[name] = value
        if rng.random() < 0.3:
            options["prompt_logprobs"] = rng.choice((0, 1))
        return SamplingParams(**options)

    def _arrive(self) -> None:
        rng = self.rng
        self._left -= 1
        ask = Ask(f"r{len(self.asks)}", self._prompt(), self._params(), rng.choice(("", "", "a", "b")))
        if ask.params.grammar is None and rng.random() < 0.06:
            ask.bad = BadGrammar(rng.randrange(6), rng.random() < 0.5)
        timeout = rng.choices((None, 1e6, 0.0), (8, 3, 0.4))[0]
        try:
            self.engine.add_request(
                ask.prompt, ask.sent, request_id=ask.id, priority=rng.choice((0, 0, 0, 1, -1)), salt=ask.salt,
                timeout=timeout,
            )  # fmt: skip
        except RequestError:
            # Longer than this pool or the context, and refused at once.
            assert len(ask.prompt) + 1 > min(self.engine.limits.pool, CONTEXT), ask
            self.count["refused"] += 1
            return
        if timeout == 0.0:
            ask.fate = "late"
        ask.seq_ids = [state.request.seq_id for state in self.engine._groups[ask.id]]
        self.asks.append(ask)
        self.count["requests"] += 1

    # What else happens

    def _interfere(self) -> None:
        rng = self.rng
        running = [a for a in self.asks if self.engine.is_unfinished(a.id)]
        if running and rng.random() < 0.012:
            ask = rng.choice(running)
            ask.fate = ask.fate or "cancelled"
            self.engine.abort(ask.id)
            self.count["cancels"] += 1
        if running and rng.random() < 0.006:
            ask = rng.choice(running)
            ask.fate = ask.fate or "late"
            for state in self.engine._groups.get(ask.id, ()):
                state.request.deadline = 0.0
            self.count["deadlines"] += 1
        if self.asks and rng.random() < 0.02 and self.family not in HYBRIDS:
            self._transfer(rng.choice(self.asks))
        if rng.random() < 0.004:
            self.engine.pages.clear_cache()
            self.count["cleared"] += 1
        if rng.random() < 0.01:
            self._force()

    def _transfer(self, ask: Ask) -> None:
        """Pages of a text go out and come back, perhaps under another salt, perhaps damaged."""
        rng = self.rng
        tokens = [*ask.prompt, *(whole(ask.deltas[0])["tokens"] if 0 in ask.deltas else ())]
        bundle = export_pages(self.engine, tokens, ask.salt)
        assert bundle.tokens.tolist() == tokens[: bundle.num_tokens]
        data = bytearray(bundle.to_bytes())
        salt = rng.choice(("", "a", "b"))
        if damaged := rng.random() < 0.2:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            found = PageBundle.from_bytes(bytes(data))
            loaded = import_pages(self.engine, found, salt)
        except ConfigError:
            assert damaged
            self.count["damaged bundles"] += 1
            return
        except CacheError:
            assert not self.setup.caching
            return
        # A letter of the model's name may have been hit: it decides nothing.
        assert torch.equal(found.tokens, bundle.tokens), "damaged tokens were taken"
        assert torch.equal(found.frames, bundle.frames), "damaged pages were taken"
        assert loaded <= bundle.num_tokens
        self.imported.setdefault(salt, []).append(tokens[: bundle.num_tokens])
        self.count["imported pages"] += loaded // PAGE_TOKENS

    def _force(self) -> None:
        """Teacher forcing between two steps, perhaps left in the middle."""
        rng = self.rng
        tokens = rng.choice(self.bases)[: rng.randint(2, 200)]
        try:
            for _, logits in self.engine.teacher_forced(tokens, 0):
                assert bool(torch.isfinite(logits).all())
                if rng.random() < 0.2:
                    break
            self.count["teacher forced"] += 1
        except (OutOfPages, Trouble, RequestError):
            self.count["teacher forcing that failed"] += 1

    # Steps

    def _drive(self) -> None:
        engine, rng = self.engine, self.rng
        if engine.speculator is not None:
            observe = engine.speculator.observe
            engine.speculator.observe = lambda works, _: observe(works, rng.uniform(0.8e-3, 1.2e-3))
        while self._left or engine.has_unfinished():
            while self._left and (rng.random() < self.setup.arrivals or not engine.has_unfinished()):
                self._arrive()
            self._interfere()
            self.steps += 1
            deltas = engine.step()
            self._quiet = 0 if deltas else self._quiet + 1
            assert self._quiet < _PATIENCE, f"nothing came for {_PATIENCE} steps; load {engine.load()}"
            for delta in deltas:
                found = self.asks[int(delta.request_id[1:])].deltas.setdefault(delta.index, [])
                assert not found or found[-1].finish_reason is None, f"{delta} after the end"
                found.append(delta)
            self._check()
        for left in (engine._states, engine._groups, engine.scheduler.running, engine.scheduler.waiting):
            assert not left, left
        pages = engine.pages.stats()
        assert (pages.open, pages.sealed) == (0, 0), pages

    def _check(self) -> None:
        engine = self.engine
        engine.pages.check()
        running: list[Request] = engine.scheduler.running
        held = engine.pages.sequences()
        assert sorted(held) == sorted(r.seq_id for r in running), (held, running)
        made = None if engine._ahead is None else engine._ahead._made
        planned = set() if made is None else {work.request.seq_id for work in made[0]}
        for request in running:
            assert engine.pages.reserved(request.seq_id) <= (request.seq_id in planned), request
            assert engine.pages.length(request.seq_id) == request.computed, request
        ids = {r.seq_id for r in [*running, *engine.scheduler.waiting]}
        assert ids == set(engine._states), (ids, set(engine._states))
        proposer = None if engine.speculator is None else engine.speculator._proposer
        if isinstance(proposer, DraftModelProposer):
            proposer.pages.check()
            assert set(proposer.pages.sequences()) <= ids, (proposer.pages.sequences(), ids)
            assert not any(proposer.pages.reserved(s) for s in proposer.pages.sequences())

    # Answers

    def _compare(self) -> None:
        expected = [alone(ask, self.setup.dtype, self.family) for ask in self.asks]
        for ask, answers in zip(self.asks, expected, strict=True):
            assert sorted(ask.deltas) == sorted(answers), (ask.id, sorted(ask.deltas))
            for index, seq_id in enumerate(ask.seq_ids):
                self._judge(ask, index, seq_id, answers[index])
        self._judge_salts(expected)

    def _judge(self, ask: Ask, index: int, seq_id: int, right: dict[str, object]) -> None:
        last, got = ask.deltas[index][-1], whole(ask.deltas[index])
        name = f"{ask.id}[{index}] of {len(ask.prompt)} tokens with {ask.params}"
        assert last.finish_reason is not None, name
        blamed = self.mischief is not None and seq_id in self.mischief.blamed
        full = last.note is not None and "KV cache" in last.note
        early = True
        if last.error is not None and last.finish_reason == "error":
            assert "Trouble: " in last.error, (name, last.error)
            assert blamed or ask.bad is not None, f"{name} pays for another one's fault: {last.error}"
            self.count["errors"] += 1
        elif last.finish_reason == "abort":
            assert ask.fate in ("cancelled", "late"), (name, ask.fate, last)
        elif full:
            size = len(ask.prompt) + len(got["tokens"])
            assert size + 1 > self.engine.limits.pool, f"{name} ends at {size} tokens: {last.note}"
            self.count["pool full"] += 1
        else:
            early = False
        for key in ("tokens", "logprobs"):
            part = right[key][: len(got[key])] if early else right[key]
            if got[key] != part:
                place = next((i for i, (a, b) in enumerate(zip(got[key], part, strict=False)) if a != b), len(part))
                raise AssertionError(
                    f"{name}: {key} {place} of {len(got[key])} is {got[key][place : place + 1]}, alone "
                    f"{part[place : place + 1]} of {len(part)}; end {got['ended']}"
                )
        if got["tokens"]:
            assert got["prompt_logprobs"] == right["prompt_logprobs"], f"{name}: prompt_logprobs"
        if not early:
            assert got == right, f"{name}: {got} but alone {right}"
            self.count["equal answers"] += 1

    def _judge_salts(self, expected: list[dict[int, dict[str, object]]]) -> None:
        """Nothing is found under a salt that was not written under it."""
        texts: dict[str, list[tuple[int, list[int]]]] = {}
        for number, (ask, answers) in enumerate(zip(self.asks, expected, strict=True)):
            for answer in answers.values():
                texts.setdefault(ask.salt, []).append((number, [*ask.prompt, *answer["tokens"]]))
        for number, ask in enumerate(self.asks):
            cached = max((d[-1].num_cached_tokens for d in ask.deltas.values()), default=0)
            known = [t for n, t in texts[ask.salt] if n != number or ask.params.n > 1]
            known += self.imported.get(ask.salt, [])
            most = max((common(ask.prompt, text) for text in known), default=0)
            assert cached <= most, f"{ask.id} found {cached} tokens under the salt '{ask.salt}'; {most} were there"
            self.count["cached tokens"] += cached


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
