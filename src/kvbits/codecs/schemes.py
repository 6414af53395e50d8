"""What makes a scheme of known codecs for a dtype of that name (:data:`kvbits.codecs.names.DTYPES`)."""

from __future__ import annotations

from kvbits.codecs.affine import Affine
from kvbits.codecs.base import Scheme
from kvbits.codecs.blocks import Blocks
from kvbits.codecs.codebook import Codebook
from kvbits.codecs.float8 import Float8
from kvbits.codecs.mixed import Mixed
from kvbits.codecs.nibbles import Nibbles
from kvbits.codecs.raw import Raw


def raw(name: str) -> Scheme:
    """16 bit."""
    return Scheme(key=Raw(), value=Raw())


def int8(name: str) -> Scheme:
    """Codes of 8 bits: keys by channel, values by token and symmetric."""
    return Scheme(key=Affine(name, 8, per="channel"), value=Affine(name, 8, symmetric=True))


def nibbles(name: str) -> Scheme:
    """Codes of 8 bits in two planes, of which a draft reads one."""
    return Scheme(key=Nibbles(name, per="channel"), value=Nibbles(name, symmetric=True))


def integer(name: str, bits: int) -> Scheme:
    """Codes of ``bits``: keys by channel, values by token."""
    return Scheme(key=Affine(name, bits, per="channel"), value=Affine(name, bits, per="token"))


def float8(name: str, mantissa: int) -> Scheme:
    """Floats of 8 bits."""
    return Scheme(key=Float8(name, mantissa), value=Float8(name, mantissa))


def codebook(name: str, bits: int) -> Scheme:
    """Entries of a codebook in a rotated basis."""
    return Scheme(key=Codebook(name, bits, centered=True), value=Codebook(name, bits))


def blocks(name: str, bits: int, block: int) -> Scheme:
    """Keys by channel, values by token and ``block`` channels."""
    return Scheme(key=Affine(name, bits, per="channel"), value=Blocks(name, bits, block))


def mixed(name: str, high: int, low: int) -> Scheme:
    """Key channels of two widths, values of the lower."""
    return Scheme(key=Mixed(name, high, low), value=Affine(name, low))
