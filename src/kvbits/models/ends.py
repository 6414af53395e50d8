"""Which tokens end a turn, whatever a model's files say of its ends."""

from __future__ import annotations

from typing import Any

TURN_ENDS = frozenset({
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>",
    "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|tool_response>", "<|eos|>",
})  # fmt: skip
"""Names of tokens that end a turn in the chat formats in use (ChatML, Llama 3, Phi, Gemma, Granite, Harmony, DeepSeek,
Kimi, SmolVLM)."""

_WITHIN = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})
"""Formats (Harmony and Solar's) in which ``<|end|>`` ends a part of an answer only."""


def turn_ends(tokenizer: Any) -> set[int]:
    """The special tokens of ``tokenizer`` that usually end a turn; none for a tokenizer without the Rust library."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return set()
    added = inner.get_added_tokens_decoder()
    ids = {name: inner.token_to_id(name) for name in TURN_ENDS}
    found = {name: number for name, number in ids.items() if number in added and added[number].special}
    if any(names <= found.keys() for names in _WITHIN):
        found.pop("<|end|>", None)
    if "<|tool_response>" in found:  # Gemma 4 has an ordinary </s>
        found.pop("</s>", None)
    return set(found.values())
