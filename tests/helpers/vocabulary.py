"""A tokenizer with as many tokens as real ones have."""

from __future__ import annotations

from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.serving import TEMPLATE

SIZE = 49_152
_COMMON = "Ġetaoinsrhldcumfpgwybvk,.0123456789"
_BLANKS = 64


def large_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 49,152 tokens: bytes, pairs of letters, pairs of pairs, and runs of up to 64 blanks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *letters]
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if len(tokens) < SIZE and left + right not in known:
            tokens.append(left + right)
            known.add(left + right)
            merges.append((left, right))

    known = set(tokens)
    run = 1
    while run < _BLANKS:
        merge("Ġ" * run, "Ġ" * run)
        run *= 2
    pairs = [(a, b) for a, b in product(_COMMON, _COMMON) if (a, b) != ("Ġ", "Ġ")]
    for pair in pairs:
        merge(*pair)
    for left, right in product(pairs, pairs):
        if right[0] != "Ġ":
            merge("".join(left), "".join(right))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert len(tokens) == SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
