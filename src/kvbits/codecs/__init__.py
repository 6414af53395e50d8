"""What the bytes of a page mean."""

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
