"""What the bytes of a page mean."""

from kvbits.codecs.base import Codec, Scheme, Side
from kvbits.codecs.layout import PageFormat, Place, PoolLayout
from kvbits.codecs.policy import OPEN, SCHEMES, Policy, codecs_in_use, parse_policy

__all__ = [
    "OPEN",
    "SCHEMES",
    "Codec",
    "PageFormat",
    "Place",
    "Policy",
    "PoolLayout",
    "Scheme",
    "Side",
    "codecs_in_use",
    "parse_policy",
]
