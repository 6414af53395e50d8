"""Text that comes token by token is what the decoder gives for all tokens, for every kind of vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.serving import wrap
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvbits.engine.detokenize import Detokenizer
from kvbits.engine.limits import RequestLimits
from kvbits.engine.outputs import Logprob
from kvbits.engine.text import decoder
from kvbits.server.logprobs import CompletionLogprobs
from kvbits.server.prepare import Preparer

HARD = "👩‍💻👩🏽‍🚀 🇩🇪 ग्रीष्म 𓀀𓀁 ﷽ naïve 世界 한 "
"""Characters of up to four bytes, joined by zero-width joiners, some of them in no vocabulary here."""

WORDS = ["hello", "world", "a", "b", "n't", "'m", ".", ",", "!", "'", "é", "世", "\ufffd"]

LIMITS = RequestLimits(vocab=1 << 20, context=1024, pool=1024, memory=1)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Tokens of two bytes: some begin in the middle of a character and end in the middle of the next.
    pairs = [a + b for a in alphabet[150:230:9] for b in alphabet[150:230:7]]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *pairs, "Ġhello", "world", "Ġ!"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(decoder: decoders.Decoder) -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", *WORDS, *("▁" + w for w in WORDS)]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoder
    return tokenizer


def llama() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return byte_fallback(decoders.Sequence(steps))


def gemma() -> Tokenizer:
    return byte_fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def metaspace() -> Tokenizer:
    return byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")]))


def unigram() -> Tokenizer:
    pieces = [
        (p, -1.0) for p in ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *("▁" + w for w in WORDS), *WORDS]
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first")])
    return tokenizer


def wordpiece(cleanup: bool) -> Tokenizer:
    pieces = ["[UNK]", *WORDS, *("##" + w for w in WORDS)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece("##", cleanup=cleanup)
    return tokenizer


def word_ends() -> Tokenizer:
    pieces = ["<unk>", *WORDS, *(w + "</w>" for w in WORDS)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return tokenizer


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "metaspace": metaspace,
    "unigram": unigram,
    "wordpiece": lambda: wordpiece(False),
    "wordpiece-cleanup": lambda: wordpiece(True),
    "word-ends": word_ends,
    "word-level": word_level,
}


class Vocabulary:
    """A tokenizer of one kind with two special tokens and an added one that is none, and the engine's decoder."""

    def __init__(self, kind: str) -> None:
        self.rust = KINDS[kind]()
        self.rust.add_special_tokens(["<s>", "</s>"])
        self.rust.add_tokens([AddedToken("<tool>", normalized=False)])
        self.size = self.rust.get_vocab_size() + 2  # two ids that are no token
        self.special = self.rust.token_to_id("<s>")
        self.skipped = {self.special, self.special + 1, self.size - 2, self.size - 1}
        self.wrapper: Any = PreTrainedTokenizerFast(tokenizer_object=self.rust)
        self.decode = decoder(SimpleNamespace(tokenizer=self.wrapper))

    def whole(self, ids: list[int]) -> str:
        return self.rust.decode(ids, skip_special_tokens=True)

    def stream(self, ids: list[int], before: list[int] | None = None) -> tuple[list[str], str]:
        detokenizer = Detokenizer(self.decode, before or [])
        return [detokenizer.push(token) for token in ids], detokenizer.flush()

    def text(self, ids: list[int], before: list[int] | None = None) -> str:
        shown, rest = self.stream(ids, before)
        return "".join(shown) + rest

    def bytes(self, text: str) -> list[int]:
        """``text`` as single bytes, where the vocabulary has them."""
        names = [f"<0x{byte:02X}>" for byte in text.encode()]
        found = [self.rust.token_to_id(name) for name in names]
        return [] if None in found else found


@pytest.fixture(scope="module", params=KINDS)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(request.param)


def sequences(vocabulary: Vocabulary, most: int = 100) -> st.SearchStrategy[list[int]]:
    """Random ids among which are real characters, cut at random places and with special tokens inside."""
    hard = [ids for ids in (vocabulary.bytes(HARD), vocabulary.rust.encode(HARD, add_special_tokens=False).ids) if ids]
    spans = [
        ids[start:stop] for ids in hard for start in range(0, len(ids), 3) for stop in range(start + 1, start + 30, 5)
    ]
    part = st.one_of(
        st.integers(0, vocabulary.size - 1).map(lambda i: [i]),
        st.just([vocabulary.special]),
        st.sampled_from(spans),
    )
    return st.lists(part, max_size=most).map(lambda parts: [token for some in parts for token in some][:most])


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_tokens(vocabulary: Vocabulary, data: st.DataObject) -> None:
    ids = data.draw(sequences(vocabulary))
    assert vocabulary.text(ids) == vocabulary.whole(ids)
    assert vocabulary.whole(ids) == vocabulary.wrapper.decode(ids, skip_special_tokens=True)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_completion_goes_on_where_its_prompt_ends(vocabulary: Vocabulary, data: st.DataObject) -> None:
    prompt, ids = data.draw(sequences(vocabulary, 20)), data.draw(sequences(vocabulary))
    shown = vocabulary.text(ids, prompt)
    # what stands before a special token is another text
    last = max((i + 1 for i, token in enumerate(prompt) if token in vocabulary.skipped), default=0)
    begin, both = vocabulary.whole(prompt[last:]), vocabulary.whole(prompt[last:] + ids)
    if not begin:
        # bytes of the prompt that show nothing (a leading space) may be of the run that the completion begins with
        assert shown in (vocabulary.whole(ids), both)
    elif both.startswith(begin):
        assert shown == both[len(begin) :]
    else:
        # the prompt ends inside a character or a run of bytes: what the completion makes of it is the completion's
        assert both.endswith(shown)


def test_junk_does_not_pile_up(vocabulary: Vocabulary) -> None:
    # a model that has lost its way: broken bytes for ever must neither be held for ever nor cost more and more
    broken = [i for i in range(vocabulary.size) if "\ufffd" in vocabulary.whole([i])]
    seen: list[int] = []
    inner = vocabulary.decode._decode
    detokenizer = Detokenizer(vocabulary.decode)
    vocabulary.decode._decode = lambda ids: (seen.append(len(ids)), inner(ids))[1]
    try:
        ids = [broken[(7 * i) % len(broken)] for i in range(2000)]
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    finally:
        vocabulary.decode._decode = inner
    assert text == inner(ids)
    # a run of single bytes is decoded when it ends; everything else in short windows
    assert sum(seen) < 2000 * 100


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whole_tokens_are_shown_at_once(vocabulary: Vocabulary, data: st.DataObject) -> None:
    whole = [i for i in range(vocabulary.size) if not any(m in vocabulary.whole([i]) for m in ("\ufffd", "<unk>"))]
    whole = [i for i in whole if not (vocabulary.rust.id_to_token(i) or "").startswith("<0x")]
    ids = data.draw(st.lists(st.sampled_from(whole), max_size=40))
    shown, rest = vocabulary.stream(ids)
    assert rest == ""
    assert all(vocabulary.whole(ids[: i + 1]) == "".join(shown[: i + 1]) for i in range(len(ids)))


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace", "unigram"])
def test_runs_of_bytes(kind: str) -> None:
    vocabulary = Vocabulary(kind)
    text = HARD.replace(" ", "") * 20
    ids = [*vocabulary.bytes(text), vocabulary.rust.token_to_id("a")]
    shown, rest = vocabulary.stream(ids)
    assert "".join(shown) + rest == vocabulary.whole(ids) == text + "a"


def test_the_first_word_of_a_completion_keeps_its_space() -> None:
    vocabulary = Vocabulary("llama")
    a, hello, world = (vocabulary.rust.token_to_id(p) for p in ("a", "▁hello", "▁world"))
    assert vocabulary.text([hello, world]) == "hello world"
    assert vocabulary.text([world, hello], [hello, a]) == " world hello"
    # an answer behind a special token, as templates end, is a text of its own
    assert vocabulary.text([world, hello], [hello, vocabulary.special]) == "world hello"


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma", "metaspace", "unigram", "wordpiece"])
def test_bytes_of_tokens_join_to_the_text(kind: str) -> None:
    vocabulary = Vocabulary(kind)
    model = tiny_model("llama", vocab_size=vocabulary.size)
    name = Preparer(wrap(model, vocabulary.wrapper, "tiny"), LIMITS).token_bytes
    whole = [i for i in range(vocabulary.size - 5) if vocabulary.whole([i]) not in ("", "<unk>", "[UNK]")]
    hard = vocabulary.bytes(HARD) or (vocabulary.rust.encode(HARD).ids if kind == "byte-level" else [])
    ids = [whole[-1], *hard, *(i for i in whole if "\ufffd" not in vocabulary.whole([i])), *hard, whole[-1]]
    assert b"".join(map(name, ids)).decode() == vocabulary.text(ids, [whole[-1]])


def test_offsets_of_tokens() -> None:
    vocabulary = Vocabulary("llama")
    preparer = Preparer(wrap(tiny_model("llama", vocab_size=vocabulary.size), vocabulary.wrapper, "tiny"), LIMITS)
    token = vocabulary.rust.token_to_id
    prompt = [vocabulary.special, token("▁hello"), token("▁世"), *vocabulary.bytes("👩")]
    answer = [*vocabulary.bytes("💻"), vocabulary.special, token("▁a"), token("b")]
    grow = CompletionLogprobs(0, preparer.token_bytes, preparer.hidden)
    at = [None, *({t: Logprob(-1.0, 1)} for t in prompt[1:])]
    # the first token and the first word's space, which the tokenizer adds, are not in the prompt's text
    assert grow.extend(prompt, at, "hello 世👩")["text_offset"] == [0, 0, 5, 7, 7, 7, 7]
    # the computer of four bytes at 8, then nothing for the special token
    found = grow.extend(answer, [{t: Logprob(-1.0, 1)} for t in answer])
    assert found["text_offset"] == [8, 8, 8, 8, 9, 9, 11]
    assert found["tokens"][:2] == ["bytes:\\xf0", "bytes:\\x9f"]
