"""The tokenizer of a GGUF file, with all that the file says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from kvbits.errors import ConfigError, KVBitsError, UnsupportedError
from kvbits.models.gguf import cache
from kvbits.models.gguf.file import GgufFile
from kvbits.models.gguf.header import Strings
from kvbits.models.gguf.splits import split_of
from kvbits.models.gguf.vocabulary import add_special, byte_level, sentencepiece, spaced_bpe

_MODELS = ("gpt2", "llama", "gemma4")
_TEMPLATE = "tokenizer.chat_template"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class Converted:
    """A vocabulary of the ``tokenizers`` library and the names of its special tokens."""

    tokenizer: Tokenizer
    roles: dict[str, str]


class _Given:
    """Hands over the tokenizer itself where transformers would copy it, which takes as long as reading it again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self._tokenizer


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of ``file``, from the user's cache if it was converted before.

    Raises ``UnsupportedError`` naming a kind of vocabulary or of words that kvbits does not know, ``ConfigError`` for a
    vocabulary that is not what it should be.
    """
    converted = _stored(file)
    if converted is None:
        converted = convert(file)
        cache.store(file.digest, f"{json.dumps(converted.roles)}\n{converted.tokenizer.to_str()}")
    options: dict[str, Any] = {**converted.roles, "clean_up_tokenization_spaces": False}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_Given(converted.tokenizer), **options)
    tokenizer.chat_template = _templates(file)
    return tokenizer


def convert(file: GgufFile) -> Converted:
    """Build the tokenizer from the vocabulary in ``file``."""
    try:
        return _convert(file)
    except KVBitsError:
        raise
    # the library raises plain exceptions for a vocabulary that contradicts itself
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot build the tokenizer of the GGUF file '{file.path}': {reason}") from error


def _convert(file: GgufFile) -> Converted:
    kind = file.string("tokenizer.ggml.model")
    if kind not in _MODELS:
        raise UnsupportedError(
            f"tokenizer.ggml.model of '{file.path.name}' is '{kind}'; kvbits knows {', '.join(_MODELS)}"
        )
    adds_bos = False
    if kind == "gpt2":
        split = split_of(file.string("tokenizer.ggml.pre", "default"))
        tokenizer, adds_bos = byte_level(file, split), split.bos
    elif kind == "llama":
        tokenizer, adds_bos = sentencepiece(file, file.flag("tokenizer.ggml.add_space_prefix", True)), True
    else:
        tokenizer, adds_bos = spaced_bpe(file), True
    name = str(file.metadata.get("general.name", "")).lower()
    add_special(tokenizer, file, strips_right="phi-3" in name or "phi3" in name)
    roles = _roles(file, tokenizer, sentencepiece=kind == "llama")
    _ends_of_texts(file, tokenizer, roles, adds_bos)
    return Converted(tokenizer, roles)


def _stored(file: GgufFile) -> Converted | None:
    text = cache.load(file.digest)
    if text is None:
        return None
    try:
        roles, _, tokenizer = text.partition("\n")
        return Converted(Tokenizer.from_str(tokenizer), dict(json.loads(roles)))
    # the library raises plain exceptions for what it cannot read; a damaged copy is made again
    except Exception:
        return None


def _roles(file: GgufFile, tokenizer: Tokenizer, sentencepiece: bool) -> dict[str, str]:
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if sentencepiece else {}
    found = {}
    for role, key in _ROLES.items():
        number = file.token_id(f"{key}_token_id")
        number = defaults.get(key) if number is None else number
        text = None if number is None else tokenizer.id_to_token(number)
        if text is not None:
            found[role] = text
    return found


def _ends_of_texts(file: GgufFile, tokenizer: Tokenizer, roles: dict[str, str], adds_bos: bool) -> None:
    """Let the tokenizer begin a text with BOS and end it with EOS, as the file or its kind of vocabulary says."""
    before, behind = [], []
    if file.flag("tokenizer.ggml.add_bos_token", adds_bos):
        before = _named(file, roles, "bos_token", asked="tokenizer.ggml.add_bos_token" in file.metadata)
    if file.flag("tokenizer.ggml.add_eos_token", False):
        behind = _named(file, roles, "eos_token", asked=True)
    if before or behind:
        tokens = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(before + behind)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            pair=[*before, "$A", *behind, *(f"{text}:1" for text in before), "$B:1", *(f"{text}:1" for text in behind)],
            special_tokens=tokens,
        )


def _named(file: GgufFile, roles: dict[str, str], role: str, asked: bool) -> list[str]:
    if role in roles:
        return [roles[role]]
    if asked:
        raise ConfigError(f"the GGUF file '{file.path}' asks for {role} with every text and names none")
    return []


def _templates(file: GgufFile) -> str | dict[str, str] | None:
    """The chat template, or all by name where the file has several."""
    default = file.metadata.get(_TEMPLATE)
    names = file.metadata.get("tokenizer.chat_templates")
    listed = list(names) if isinstance(names, Strings) else []
    texts = {name: file.metadata.get(f"{_TEMPLATE}.{name}") for name in listed}
    found = {name: str(text) for name, text in texts.items() if text is not None}
    if found and default is not None:
        return {"default": str(default), **found}
    return None if default is None else str(default)
