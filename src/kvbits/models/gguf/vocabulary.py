"""The vocabulary of a GGUF file as the models of the ``tokenizers`` library."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kvbits.errors import ConfigError
from kvbits.models.ends import TURN_ENDS
from kvbits.models.gguf.file import GgufFile
from kvbits.models.gguf.splits import Split

_SPACE = "\u2581"


class Kind(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def byte_level(file: GgufFile, split: Split) -> Tokenizer:
    """Byte-level BPE (GPT-2's), with the words of ``split``."""
    vocabulary = _by_text(file)
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(file), ignore_merges=split.whole))
    words = [pre_tokenizers.Split(Regex(e), "isolated") for e in split.expressions]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(file: GgufFile, prefix: bool) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours the pair whose token has the best score is joined, what is no token falls
    back to bytes. ``prefix`` puts a space before the text and behind every special token.
    """
    vocabulary = _by_text(file)
    scores = file.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(vocabulary):
        raise ConfigError(
            f"the GGUF file '{file.path}' has {0 if scores is None else len(scores)} tokenizer.ggml.scores for "
            f"{len(vocabulary)} tokens"
        )
    merges = merges_by_score(vocabulary, scores)
    return _spaced(file, vocabulary, merges, prefix)


def spaced_bpe(file: GgufFile) -> Tokenizer:
    """BPE with merges over text whose spaces are U+2581, without bytes' own alphabet (Gemma 4)."""
    tokenizer = _spaced(file, _by_text(file), _merges(file), prefix=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    return tokenizer


def _spaced(file: GgufFile, vocabulary: dict[str, int], merges: list[tuple[str, str]], prefix: bool) -> Tokenizer:
    unknown = file.token_id("unknown_token_id")
    unknown = 0 if unknown is None else unknown
    name = next((text for text, number in vocabulary.items() if number == unknown), None)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=name, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    if not any(_SPACE in text.lstrip(_SPACE) for text in vocabulary):
        # No token has a space behind another character, so no merge crosses such a place: words can be cut there,
        # which leaves the tokens as they are and the work linear.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+"), "isolated")
    ends = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*ends, decoders.Strip(" ", 1, 0)] if prefix else ends)
    return tokenizer


def merges_by_score(vocabulary: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of tokens whose text is a token's, best score of that token first."""
    texts = list(vocabulary)
    numbers = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    found: list[tuple[str, str]] = []
    for index in np.argsort(-np.asarray(scores, np.float64)[numbers], kind="stable"):
        text = texts[index]
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        found += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]])) if len(pairs) > 1 else pairs
    return found


def add_special(tokenizer: Tokenizer, file: GgufFile, strips_right: bool) -> None:
    """Mark the tokens that are found in a text before anything else.

    Control tokens, the unknown token and whatever usually ends a turn are special (left out of decoded text);
    user-defined ones are not. ``strips_right``: special tokens take the blanks behind them (Phi-3).
    """
    kinds = file.numbers("tokenizer.ggml.token_type")
    tokens = file.strings("tokenizer.ggml.tokens")
    assert tokens is not None
    special, plain = [], []
    for number, text in enumerate(tokens):
        kind = Kind.NORMAL if kinds is None or number >= len(kinds) else kinds[number]
        if kind in (Kind.CONTROL, Kind.UNKNOWN) or text in TURN_ENDS:
            strip = strips_right and text not in ("<unk>", "<s>", "<|endoftext|>")
            special.append(AddedToken(text, special=True, normalized=False, rstrip=strip))
        elif kind == Kind.USER_DEFINED:
            plain.append(AddedToken(text, special=False, normalized=False))
    tokenizer.add_special_tokens([token for token in special if token.content])
    tokenizer.add_tokens([token for token in plain if token.content])


def _by_text(file: GgufFile) -> dict[str, int]:
    tokens = file.strings("tokenizer.ggml.tokens")
    if tokens is None:
        raise ConfigError(f"the GGUF file '{file.path}' has no tokenizer.ggml.tokens")
    return {text: number for number, text in enumerate(tokens)}


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = file.strings("tokenizer.ggml.merges")
    if merges is None:
        raise ConfigError(f"the GGUF file '{file.path}' has no tokenizer.ggml.merges")
    found = []
    for merge in merges:
        at = merge.find(" ", 1)
        if at < 0:
            raise ConfigError(f"tokenizer.ggml.merges of '{file.path}' has {merge!r}, which is no pair")
        found.append((merge[:at], merge[at + 1 :]))
    return found
