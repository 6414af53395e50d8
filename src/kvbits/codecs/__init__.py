"""What the bytes of a page mean. Names are imported when they are used: :mod:`kvbits.codecs.names` needs no torch."""

from typing import TYPE_CHECKING

from kvbits.lazy import lazily

if TYPE_CHECKING:
    from kvbits.codecs.base import Codec, LayerRounding, PageFormat, Rounding, Scheme, Side
    from kvbits.codecs.layout import PageLayout, Place, PoolLayout
    from kvbits.codecs.policy import OPEN, SCHEMES, Policy, codecs_in_use, parse_policy
    from kvbits.codecs.policy_file import policy_of

__all__ = [
    "OPEN",
    "SCHEMES",
    "Codec",
    "LayerRounding",
    "PageFormat",
    "PageLayout",
    "Place",
    "Policy",
    "PoolLayout",
    "Rounding",
    "Scheme",
    "Side",
    "codecs_in_use",
    "parse_policy",
    "policy_of",
]

_MODULES = {
    "base": ("Codec", "LayerRounding", "PageFormat", "Rounding", "Scheme", "Side"),
    "layout": ("PageLayout", "Place", "PoolLayout"),
    "policy": ("OPEN", "SCHEMES", "Policy", "codecs_in_use", "parse_policy"),
    "policy_file": ("policy_of",),
}
__getattr__ = lazily(__name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names})
