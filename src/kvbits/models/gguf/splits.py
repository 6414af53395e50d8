r"""How byte-level BPE vocabularies cut text into words before they merge (``tokenizer.ggml.pre``).

The expressions are those of the models' own ``tokenizer.json`` files, in the order in which each is applied to the
pieces of the one before; which name stands for which is llama.cpp's table. A name says two more things: whether a word
that is a token as it is needs no merges, and whether a text begins with BOS where the file does not say.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbits.errors import UnsupportedError

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_OTHERS}|{_BLANKS}"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}|{_BLANKS}"
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased(endings: str, numbers: str) -> str:
    return (
        rf"{_BEFORE}[{_UPPER}]*[{_LOWER}]+{endings}|{_BEFORE}[{_UPPER}]+[{_LOWER}]*{endings}|{numbers}"
        rf"|{_SLASHES}|{_BLANKS}"
    )


_TEKKEN = _cased("", r"\p{N}")
_GPT4O = _cased(f"{_ENDINGS}?", r"\p{N}{1,3}")
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_PUNCTUATION = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)
_ALPHABETS = (
    "["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
"""The cased letters of Unicode as DeepSeek LLM's tokenizer lists them."""

_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class Split:
    """``expressions`` in order; ``whole``: a word that is a token needs no merges; ``bos``: a text begins with BOS
    unless the file says otherwise."""

    expressions: tuple[str, ...]
    whole: bool = False
    bos: bool = False


_GPT = Split((_GPT2,))
_DIGITS = Split((r"\p{N}", _GPT2))
_LLAMA = Split((_LLAMA3,), whole=True, bos=True)
_QWEN = Split((_QWEN2,))
_O200K = Split((_GPT4O,))
_DEEPSEEK = Split((r"\p{N}{1,3}", _CJK, _PUNCTUATION))
_GLM = Split((_LLAMA3,), whole=True)
_BAILING = Split((
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
))  # fmt: skip

_NAMES: tuple[tuple[str, Split], ...] = (
    ("gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert", _GPT),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _DIGITS),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", _LLAMA),
    ("dbrx smaug-bpe chatglm-bpe", Split((_LLAMA3,))),
    ("glm4 glm5", _GLM),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN),
    ("qwen35", Split((_QWEN35,))),
    ("tekken", Split((_TEKKEN,), whole=True, bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _O200K),
    ("tiny_aya cohere2moe", Split((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK),
    ("deepseek-llm", Split(
        (r"[\r\n]", rf"\s?{_ALPHABETS}", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+")
    )),
    ("deepseek-coder", Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"))),
    ("falcon", Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("poro-chat bloom gpt3-finnish", Split((_BLOOM,))),
    ("viking", Split((_BLOOM, r"\p{N}"))),
    ("seed-coder", Split((rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",))),
    ("bailingmoe bailingmoe2 llada-moe", _BAILING),
    ("minicpm5", Split((r"\p{N}{1,3}", rf"{_WORDS}|\p{{N}}+|{_OTHERS}|{_BLANKS}"), whole=True)),
    ("default", Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
)  # fmt: skip

SPLITS = {name: split for names, split in _NAMES for name in names.split()}
"""By ``tokenizer.ggml.pre``; ``default`` is what llama.cpp does for a file without one."""


def split_of(name: str) -> Split:
    """Raises ``UnsupportedError`` for a ``name`` that kvbits does not know."""
    if name not in SPLITS:
        raise UnsupportedError(f"tokenizer.ggml.pre is '{name}'; kvbits knows {', '.join(sorted(SPLITS))}")
    return SPLITS[name]
