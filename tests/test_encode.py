"""Tokenizing in several threads, and telling from a little of a text that all of it is too long."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.serving import byte_tokenizer
from helpers.tiny import tiny_tokenizer
from helpers.vocabulary import large_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvbits.engine.encode import Encoder
from kvbits.engine.limits import RequestLimits
from kvbits.errors import RequestError

CONTEXT = 500


def encoder_of(tokenizer: Any, context: int = CONTEXT) -> Encoder:
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, name="m")
    return Encoder(loaded, RequestLimits(vocab=1 << 20, context=context, pool=1 << 20, memory=1))


def wrapped(inner: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def without_blanks() -> PreTrainedTokenizerFast:
    """Byte-level, but blanks are cut out first."""
    tokenizer = byte_tokenizer()
    cut: list[Any] = [pre_tokenizers.Split(Regex(r"\s"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    return tokenizer


def normalized(*steps: Any) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


def greedy_added() -> PreTrainedTokenizerFast:
    """A special token that takes all blanks beside it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<mask>", lstrip=True, rstrip=True)]})
    return tokenizer


def with_unknown() -> PreTrainedTokenizerFast:
    """Byte-level without most bytes: runs of them are one unknown token."""
    vocab = {"<unk>": 0, **{letter: i for i, letter in enumerate("abcdefgh", start=1)}}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrapped(inner)


def word_pieces() -> PreTrainedTokenizerFast:
    """Words of more than 100 letters are one unknown token."""
    inner = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2, "b": 3, "##b": 4}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(inner)


def unigram() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -1.5), ("\u2581", -2.0)], 0, False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrapped(inner)


LOSSY: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "words": tiny_tokenizer, "blanks removed": without_blanks, "NFKC": lambda: normalized(normalizers.NFKC()),
    "strip": lambda: normalized(normalizers.Strip(), normalizers.Replace("aa", "a")), "mask": greedy_added,
    "unknown bytes": with_unknown, "word pieces": word_pieces, "unigram": unigram,
}  # fmt: skip
KEEPING = {"bytes": byte_tokenizer, "large": large_tokenizer}
ALL = {name: make() for name, make in {**LOSSY, **KEEPING}.items()}
PIECES = ("a", "b", " ", "  " * 40, "w5 ", "the cat sat. ", "\u00e9\u0301", "\ufdfa", "\u1100\u1161\u11a8",
          "\U0001f600", "<mask>", "</s>", "aaaa" * 30, "\n", "zzzz", "3 141 592")  # fmt: skip
TEXTS = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from((1, 3, 40, 900, 3000))), max_size=5).map(
    lambda parts: "".join(piece * times for piece, times in parts)
)


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=12)
@given(text=TEXTS, special=st.booleans())
def test_only_what_is_too_long_is_refused(name: str, text: str, special: bool) -> None:
    tokenizer = ALL[name]
    right = tokenizer(text, add_special_tokens=special)["input_ids"]
    encoder = encoder_of(tokenizer)
    assert encoder.ids(text, special) == right
    try:
        found, refusal = encoder.prompt(text, special), ""
    except RequestError as error:
        found, refusal = right, str(error)
    assert found == right
    if refusal:
        least = re.match(
            rf"this model's maximum context length is {CONTEXT} tokens; the prompt has at least (\d+) tokens", refusal
        )
        assert least is not None
        assert CONTEXT < int(least[1]) <= len(right)


def test_where_bytes_alone_tell() -> None:
    assert {name: encoder_of(ALL[name]).longest for name in LOSSY} == dict.fromkeys(LOSSY)
    assert encoder_of(byte_tokenizer()).longest == len("<pad>")
    assert encoder_of(ALL["large"]).longest == 64
    # A token for 64 blanks: exactly as many as fit, and one more.
    for tokens in (CONTEXT, CONTEXT + 1):
        encoder, text = encoder_of(ALL["large"]), " " * (64 * tokens)
        if tokens == CONTEXT:
            assert len(encoder.prompt(text, False)) == CONTEXT
        else:
            with pytest.raises(RequestError, match="at least 501 tokens"):
                encoder.prompt(text, False)


class Watched(Encoder):
    """Counts the characters that are tokenized."""

    seen = 0

    def ids(self, text: str, add_special_tokens: bool) -> list[int]:
        self.seen += len(text)
        return super().ids(text, add_special_tokens)


@pytest.mark.parametrize("name", ["words", "NFKC", "mask", "unigram", "bytes", "large"])
def test_a_text_of_eight_mebibytes_is_refused_after_a_little_of_it(name: str) -> None:
    encoder = encoder_of(ALL[name])
    watched = Watched(encoder._loaded, encoder._limits)
    with pytest.raises(RequestError, match=r"length is 500 tokens; the prompt has at least \d+ tokens"):
        watched.prompt("w5 ab " * ((8 << 20) // 6), False)
    assert watched.seen <= 1 << 16


def test_threads_do_not_disturb_each_other() -> None:
    """With a file that says how to cut and pad, which the wrapper undoes at its first call."""
    tokenizer = large_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    encoder = encoder_of(tokenizer, 10**6)
    rng = random.Random(0)
    texts = ["".join(rng.choices("the cat and 17 dogs\n", k=rng.choice((5, 500, 50_000)))) for _ in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: encoder.prompt(text, True), texts))
    plain = large_tokenizer()
    assert found == [plain(text)["input_ids"] for text in texts]


def test_a_tokenizer_with_python_of_its_own_is_asked_itself() -> None:
    class Odd(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
            # One at a time: it need not be made for more.
            assert not self.__dict__.setdefault("busy", threading.Event()).is_set()
            self.busy.set()
            found = super().__call__(text.upper(), *args, **options)
            self.busy.clear()
            return found

    encoder = encoder_of(Odd(tokenizer_object=byte_tokenizer().backend_tokenizer))
    assert encoder.longest is None
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: encoder.ids(text, True), ["abc"] * 50))
    assert found == [byte_tokenizer()("ABC")["input_ids"]] * 50
    with pytest.raises(RequestError, match="m has no tokenizer"):
        encoder_of(None).prompt("x", True)
