"""Every format of weights, the one line that a new one adds here."""

from __future__ import annotations

from kvbits.weights.base import WeightFormat
from kvbits.weights.plain import Bf16, Group, Group8
from kvbits.weights.super import SuperHalves, SuperMin

FORMATS: dict[str, WeightFormat] = {
    made.name: made
    for made in (
        Bf16("bf16", 30, 2, 4),
        Group8("q8_0", 8, 32, 34),
        Group("q4_0", 2, 32, 18),
        Group("q4_1", 3, 32, 20, with_min=True),
        Group("q5_0", 6, 32, 22, width=5),
        Group("q5_1", 7, 32, 24, width=5, with_min=True),
        SuperMin("q4_k", 12, 256, 144),
        SuperMin("q5_k", 13, 256, 176, width=5),
        SuperHalves("q6_k", 14, 256, 210),
        Group("int8", 1008, 32, 36, width=8, with_min=True),
        Group("uint4", 1009, 32, 20, with_zero=True),
        Group("uint8", 1010, 32, 36, width=8, with_zero=True),
    )
}
"""By ggml's name in lower case, and three of our own; the layouts of ``csrc/weights/formats.h``."""

ROUNDED = {"bf16": FORMATS["bf16"], "int8": FORMATS["int8"], "int4": FORMATS["q4_1"]}
"""What weights of 16 bits are rounded to, by the name that users write."""
