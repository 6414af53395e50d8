"""Tokenizers of GGUF files against ones built in another way: the ``tokenizers`` library's own training, and
SentencePiece's algorithm written out."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.gguf_files import save_gguf, word_vocabulary, write
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvbits.engine.text import encode, encode_chat, end_tokens
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models import load_model
from kvbits.models.gguf import GgufFile, cache, read_tokenizer
from kvbits.models.gguf import tokenizer as conversion

TEXT = (
    "The cat sat on the mat; 1234 cats, 12.5 % don't.\n\n  def f(x):\n\treturn x**2\nEl niño comió ¡muchísimo! 中文字 "
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvbits" / "tokenizers"


def trained(pre: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Byte-level BPE of 400 tokens, trained by the library on :data:`TEXT` with words as ``pre`` cuts them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer


def as_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(m) if isinstance(m, list) else m for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def read(directory: Path, metadata: dict[str, Any]) -> Any:
    return read_tokenizer(GgufFile(write(directory / "vocabulary.gguf", "llama", metadata, {})))


WORDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("pre", WORDS)
def test_byte_level_vocabularies_tokenize_as_the_library_that_made_them(pre: str, tmp_path: Path) -> None:
    expected = trained(WORDS[pre])
    found = read(tmp_path, as_metadata(expected, pre))
    generator = random.Random(0)
    texts = [TEXT, "", " ", "\n\n\n", "   x  ", "12345", "<|im_start|>user<|im_end|>"]
    texts += ["".join(generator.choices(TEXT + "é🤗\u200b", k=80)) for _ in range(300)]
    for text in texts:
        ids = expected.encode(text).ids
        assert found(text)["input_ids"] == ids
        assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids)


def test_llama3_begins_with_bos_and_takes_whole_words_first(tmp_path: Path) -> None:
    metadata = as_metadata(trained(WORDS["gpt-2"]), "llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqzq"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    whole = len(metadata["tokenizer.ggml.tokens"]) - 1  # a token that no merge reaches
    assert read(tmp_path, metadata)("zqzq")["input_ids"] == [0, whole]
    without = read(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": False})
    assert without("zqzq")["input_ids"] == [whole]
    other = read(tmp_path, metadata | {"tokenizer.ggml.pre": "qwen2"})
    assert len(other("zqzq")["input_ids"]) == 4
    both = read(tmp_path, metadata | {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_eos_token": True})
    assert both("a")["input_ids"] == [*other("a")["input_ids"], 0]
    with pytest.raises(UnsupportedError, match=r"'mine'; kvbits knows .*qwen2"):
        read(tmp_path, metadata | {"tokenizer.ggml.pre": "mine"})
    with pytest.raises(UnsupportedError, match="'rwkv'; kvbits knows gpt2, llama"):
        read(tmp_path, metadata | {"tokenizer.ggml.model": "rwkv"})


def sentencepiece_metadata(prefix: bool = True) -> dict[str, Any]:
    """A vocabulary in the manner of Llama 2's: bytes, characters, pieces with scores that fall."""
    words = "he ll hell llo hello _h _hello __ ____ lo el _a ab ba aba bab _ab _w or wor ld _world _wor aa aaa"
    pieces = [*words.replace("_", "\u2581").split(), "\n\n"]
    single = ["\u2581", *"helowrdab\n.é中"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *single]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(single))
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1e3 - i for i in range(len(single))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, "<|user|>", "<turn>"],
        "tokenizer.ggml.token_type": [*kinds, 3, 4],
        "tokenizer.ggml.scores": [*scores, 0.0, 0.0],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def sentencepiece_ids(metadata: dict[str, Any], text: str, prefix: bool) -> list[int]:
    """SentencePiece's BPE (Kudo and Richardson, 2018): join the neighbours whose piece has the best score, leftmost
    first; then bytes for what is no piece."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(((" " if prefix else "") + text).replace(" ", "\u2581")) if text else []
    while True:
        pairs = enumerate(pairwise(symbols))
        joined = [(scores[ids[a + b]], -i) for i, (a, b) in pairs if a + b in ids]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizes_as_its_algorithm(prefix: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    metadata = sentencepiece_metadata(prefix)
    found = read(tmp_path_factory.mktemp("spm"), metadata)

    @settings(max_examples=400, deadline=None)
    @given(st.text(alphabet="helowrdab \n.é中🤗\t", max_size=40))
    def check(text: str) -> None:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == sentencepiece_ids(metadata, text, prefix)
        assert found.decode(ids) == text

    check()
    assert found("hello world")["input_ids"][0] == 1  # BOS by the kind of vocabulary
    ids = found("hello<|user|>hello<turn>hello", add_special_tokens=False)["input_ids"]
    hello = sentencepiece_ids(metadata, "hello", prefix)
    count = len(metadata["tokenizer.ggml.tokens"])
    assert ids == [*hello, count - 2, *hello, count - 1, *hello]
    assert "<|user|>" not in found.decode(ids, skip_special_tokens=True)
    assert "<turn>" in found.decode(ids, skip_special_tokens=True)


def test_words_are_cut_only_where_no_token_crosses(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "a\u2581b"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -500.0]
    metadata["tokenizer.ggml.tokens"].append("a\u2581")
    metadata["tokenizer.ggml.token_type"].append(1)
    metadata["tokenizer.ggml.scores"].append(-501.0)
    found = read(tmp_path, metadata)
    for text in ("a b", "ha ba", "aa  b a b"):
        assert found(text, add_special_tokens=False)["input_ids"] == sentencepiece_ids(metadata, text, True)


def chat_file(directory: Path, changes: dict[str, Any]) -> str:
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    vocabulary = word_vocabulary() | {"tokenizer.chat_template": template} | changes
    return save_gguf(tiny_model("llama"), directory / "m.gguf", vocabulary=vocabulary)


@pytest.mark.parametrize("key", ["eot", "eom"])
def test_every_end_that_the_file_names_ends_an_answer(key: str, tmp_path: Path) -> None:
    loaded = load_model(chat_file(tmp_path, {f"tokenizer.ggml.{key}_token_id": 77}), "float32")
    assert end_tokens(loaded) == {2, 77}
    assert loaded.model.config.eos_token_id == 2  # and the fingerprint stays
    assert encode(loaded, "w4w") == [95, 96, 95]
    assert encode_chat(loaded, [{"role": "user", "content": "w4"}]) == [1, 95, 96]


@pytest.mark.parametrize("kind", [1, 3])
@pytest.mark.parametrize("name", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"])
def test_the_usual_ends_of_a_turn_end_an_answer(name: str, kind: int, tmp_path: Path) -> None:
    vocabulary = word_vocabulary()
    tokens, kinds = list(vocabulary["tokenizer.ggml.tokens"]), list(vocabulary["tokenizer.ggml.token_type"])
    tokens[50], kinds[50] = name, kind
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    assert end_tokens(load_model(chat_file(tmp_path, changes), "float32")) == {2, 50}


def test_the_end_of_a_part_is_not_that_of_an_answer(tmp_path: Path) -> None:
    vocabulary = word_vocabulary()
    tokens, kinds = list(vocabulary["tokenizer.ggml.tokens"]), list(vocabulary["tokenizer.ggml.token_type"])
    for i, name in enumerate(("<|end|>", "<|return|>", "<|call|>")):
        tokens[50 + i], kinds[50 + i] = name, 3
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    assert end_tokens(load_model(chat_file(tmp_path, changes), "float32")) == {2, 51, 52}


class TestCache:
    def test_the_second_reading_converts_nothing(
        self, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metadata = sentencepiece_metadata()
        first = read(tmp_path, metadata)
        assert len(list(own_cache.iterdir())) == 1
        monkeypatch.setattr(conversion, "convert", lambda file: pytest.fail("converted again"))
        second = read(tmp_path, metadata)
        for text in ("hello world", "  ab\n<|user|>", "é🤗"):
            assert second(text)["input_ids"] == first(text)["input_ids"]
        assert second.special_tokens_map == first.special_tokens_map
        assert second.bos_token == "<s>"

    def test_another_vocabulary_is_another_file(self, tmp_path: Path, own_cache: Path) -> None:
        first = read(tmp_path, sentencepiece_metadata())
        other = read(tmp_path, sentencepiece_metadata(prefix=False))
        assert other("ab", add_special_tokens=False)["input_ids"] != first("ab", add_special_tokens=False)["input_ids"]
        assert len(list(own_cache.iterdir())) == 2

    def test_a_damaged_copy_is_made_again(self, tmp_path: Path, own_cache: Path) -> None:
        read(tmp_path, sentencepiece_metadata())
        (file,) = own_cache.iterdir()
        whole = file.read_bytes()
        for damage in (b"", b"\xff\xfe", whole[: len(whole) // 2], b"[]\n{}"):
            file.write_bytes(damage)
            assert read(tmp_path, sentencepiece_metadata())("hello")["input_ids"][0] == 1
            assert file.read_bytes() == whole

    def test_no_place_to_write_is_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("no directory")
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
        assert read(tmp_path, sentencepiece_metadata())("hello")["input_ids"][0] == 1
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", str(blocked))
        assert cache.directory() == blocked / ".cache" / "kvbits" / "tokenizers"
        assert read(tmp_path, sentencepiece_metadata())("hello")["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.scores": [0.0] * 3}, "scores"),
        ({"tokenizer.ggml.tokens": "none"}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["ab"]}, "'ab', which is no pair"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["x1 y2"]}, "x1"),
        ({"tokenizer.ggml.model": 5}, "tokenizer.ggml.model is 5"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_named(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read(tmp_path, sentencepiece_metadata() | changes)
    assert "\n" not in str(caught.value)
