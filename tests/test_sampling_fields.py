"""Fields that bound which tokens may come: the same answer alone, in a batch and in any chunks, and it obeys them."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.serving import engine_of
from helpers.speculating import GREEDY, KINDS, LETTERS, PROMPTS, model, run

from kvbits.engine.params import SamplingParams

FIELDS = ("ends held back", "stop strings held back", "few tokens", "bad words")


@pytest.mark.parametrize("chunk", [64, 256])
def test_the_same_alone_and_in_a_batch_of_all_kinds(chunk: int) -> None:
    kinds = [*FIELDS, "greedy", "sampled with penalties"]
    asks = [(prompt, KINDS[kind]) for kind in kinds for prompt in PROMPTS[:4]]
    options = {"batch_invariant": True, "enable_prefix_caching": False}
    together = engine_of(model(), max_num_batched_tokens=chunk, **options)
    found = run(together, [prompt for prompt, _ in asks], [params for _, params in asks])
    by_name = {key: rest for key, *rest in found}
    for place, (prompt, params) in enumerate(asks):
        ((_, *alone),) = run(engine_of(model(), **options), [prompt], [params])
        assert by_name[str(place), 0] == alone, (place, params)


def answers(kind: str, **changes: object) -> list[tuple]:
    params = dataclasses.replace(KINDS[kind], **changes)
    return run(engine_of(model(), batch_invariant=True), PROMPTS, [params] * len(PROMPTS))


def test_the_ends_come_late_and_then_as_before() -> None:
    """Before ``min_tokens`` the likeliest token that is no end; behind it the first end ends the answer."""
    ends = {2, *range(40, 48)}
    found = answers("ends held back")
    assert any(len(tokens) < 150 for _, tokens, *_ in found)
    for _, tokens, _, reason, stop, _ in found:
        assert not ends & set(tokens[:90])
        assert len(tokens) >= 90
        assert not ends & set(tokens[:-1])
        assert (tokens[-1] in ends, reason) in ((True, "stop"), (False, "length"))
        assert (stop == tokens[-1]) is (tokens[-1] in ends - {2})


def test_stop_strings_count_behind_the_first_tokens_and_are_kept() -> None:
    for _, tokens, text, reason, stop, _ in answers("stop strings held back"):
        if reason == "stop":
            assert len(tokens) > 20
            assert text.endswith(stop)
        assert len(tokens) >= 20


def test_only_what_is_allowed_comes_and_of_it_the_likeliest() -> None:
    """Against a bias that no other token can make up for."""
    biased = dict.fromkeys((0, *LETTERS), 100.0)
    want = answers("greedy", logit_bias=biased)
    found = answers("few tokens")
    assert [tokens for _, tokens, *_ in found] == [tokens for _, tokens, *_ in want]
    for _, tokens, text, *_ in found:
        assert set(tokens) <= {0, *LETTERS}
        assert text.count("<pad>") == tokens.count(0)


def test_bad_words_never_come_and_their_parts_do() -> None:
    texts = "".join(text for _, _, text, *_ in answers("bad words"))
    free = "".join(text for _, _, text, *_ in answers("bad words", bad_words=()))
    assert all(word in free for word in ("bc", "c", "de"))
    for text in (text for _, _, text, *_ in answers("bad words")):
        assert not any(word in text for word in ("bc", "c", "def"))
    assert "de" in texts
    assert "ef" in texts


def test_what_leaves_no_token_ends_that_answer_alone() -> None:
    nothing = SamplingParams(max_tokens=5, allowed_token_ids=LETTERS[:1], bad_words=("b",))
    engine = engine_of(model(), batch_invariant=True)
    engine.add_request(PROMPTS[0], nothing, request_id="none")
    engine.add_request(PROMPTS[0], GREEDY, request_id="greedy")
    errors, tokens = set(), []
    while engine.has_unfinished():
        for delta in engine.step():
            errors |= {(delta.request_id, delta.error)} if delta.error else set()
            tokens += delta.token_ids if delta.request_id == "greedy" else []
    assert {name for name, _ in errors} == {"none"}
    assert all("bad_words" in text for _, text in errors)
    assert tokens == answers("greedy")[0][1]
    engine.pages.check()
