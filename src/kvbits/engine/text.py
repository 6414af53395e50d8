"""What the engine needs of a tokenizer: encode, decode, and which tokens end an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvbits.engine.detokenize import TokenDecoder
from kvbits.errors import RequestError
from kvbits.models import LoadedModel, turn_ends


class Decoders:
    """A tokenizer's decoders: token ids to text, spaces as the vocabulary has them.

    One for each set of special tokens that are shown; none of them is by default.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer: Any = loaded.tokenizer
        self._special = frozenset(special_tokens(loaded))
        self._known: dict[frozenset[int], TokenDecoder] = {}

    def showing(self, skip_special_tokens: bool = True, visible: Sequence[int] = ()) -> TokenDecoder:
        """The decoder that shows no special token but the ``visible`` ones, or all of them."""
        shown = self._special.intersection(visible) if skip_special_tokens else self._special
        if shown not in self._known:
            self._known[shown] = self._make(self._special - shown)
        return self._known[shown]

    def _make(self, hidden: frozenset[int]) -> TokenDecoder:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return TokenDecoder(lambda ids: "")
        skips = hidden == self._special

        def kept(ids: list[int]) -> list[int]:
            return ids if skips else [token for token in ids if token not in hidden]

        if tokenizer.is_fast:
            # The Rust tokenizer itself: the wrapper costs ten times as much, and this runs for every token.
            inner = tokenizer.backend_tokenizer
            return TokenDecoder(
                lambda ids: str(inner.decode(kept(ids), skip_special_tokens=skips)), inner.id_to_token, hidden
            )
        size = len(tokenizer)

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(kept(ids), skip_special_tokens=skips, clean_up_tokenization_spaces=False))

        def name(token: int) -> str | None:
            return str(tokenizer.convert_ids_to_tokens(token)) if token < size else None

        return TokenDecoder(decode, name, hidden)


def decoder(loaded: LoadedModel) -> TokenDecoder:
    """The decoder that shows no special token."""
    return Decoders(loaded).showing()


def special_tokens(loaded: LoadedModel) -> list[int]:
    """The ids of the tokens that a text does not show by default."""
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        return []
    if tokenizer.is_fast:
        return [t for t, added in tokenizer.backend_tokenizer.get_added_tokens_decoder().items() if added.special]
    return list(tokenizer.all_special_ids)


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The tokens with which the model ends its answer: what its files name and the usual ends of a turn."""
    model: Any = loaded.model
    found: set[int] = set()
    sources = [model.generation_config.eos_token_id] if model.generation_config is not None else []
    sources.append(model.config.get_text_config().eos_token_id)
    if loaded.tokenizer is not None:
        sources.append(loaded.tokenizer.eos_token_id)
    for ids in sources:
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found | turn_ends(loaded.tokenizer))


def encode(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of a plain prompt, special tokens as the tokenizer adds them."""
    return list(_tokenizer(loaded)(text)["input_ids"])


def encode_plain(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of a text without special tokens around it."""
    return list(_tokenizer(loaded)(text, add_special_tokens=False)["input_ids"])


def encode_chat(
    loaded: LoadedModel, messages: Sequence[Mapping[str, Any]], *, split_special_tokens: bool = True, **template: Any
) -> list[int]:
    """Token ids of a chat in the model's own template, ready for the assistant's answer.

    Raises ``RequestError`` as :func:`chat_text` and :func:`encode_rendered` do.
    """
    text = chat_text(loaded, messages, split_special_tokens=split_special_tokens, **template)
    tokenizer = _tokenizer(loaded)

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode_rendered(loaded, text, plain) if split_special_tokens else plain(text)


def encode_rendered(loaded: LoadedModel, text: str, plain: Callable[[str], list[int]]) -> list[int]:
    """Token ids of what :func:`chat_text` gave; ``plain`` encodes a text in which nothing is hidden.

    Raises ``RequestError`` for a tokenizer that cannot tell a control token from its text.
    """
    try:
        return loaded.control_tokens.encode(text, plain)
    except ValueError as error:
        raise RequestError(f"{error} with the tokenizer of {loaded.name}; split_special_tokens turns it off") from error


def chat_text(
    loaded: LoadedModel, messages: Sequence[Mapping[str, Any]], *, split_special_tokens: bool = True, **template: Any
) -> str:
    """A chat in the model's own template, ready for the assistant's answer.

    A control token that a message or a tool spells is text, unless ``split_special_tokens`` is off; the template's own
    are tokens: :func:`encode_rendered` tells them apart. Raises ``RequestError`` when the tokenizer has no template or
    the template refuses the messages.
    """
    tokenizer = _tokenizer(loaded)
    if tokenizer.chat_template is None:
        raise RequestError(
            f"the tokenizer of {loaded.name} has no chat template, as base models have none; "
            "use generate with a plain prompt"
        )
    plain, options = list(messages), {"add_generation_prompt": True, **template}
    if split_special_tokens:
        hide = loaded.control_tokens.hide
        plain = hide(plain)
        options = {name: value if name == "chat_template" else hide(value) for name, value in options.items()}
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, **options))
    # A template is a program of the model's author: it raises what it likes, mostly Jinja errors.
    except Exception as error:
        raise RequestError(f"the chat template of {loaded.name} refuses the messages: {error}") from error


def _tokenizer(loaded: LoadedModel) -> Any:
    if loaded.tokenizer is None:
        raise RequestError(f"{loaded.name} has no tokenizer; give prompts as token ids")
    return loaded.tokenizer
