"""The strings that name policies, and where their layers lie in frames."""

from __future__ import annotations

import re

import pytest

from kvbits.codecs import SCHEMES, PoolLayout, parse_policy, policy_of
from kvbits.config import ALIGNMENT, LayerGeometry, ModelGeometry, align
from kvbits.errors import ConfigError, UnsupportedError


class TestPolicies:
    def test_what_may_be_written(self) -> None:
        assert parse_policy(" INT4 ", 3).layers == (SCHEMES["int4"],) * 3
        mixed = parse_policy("int8,int4", 2).layers[0]
        assert (mixed.key, mixed.value) == (SCHEMES["int8"].key, SCHEMES["int4"].value)
        assert parse_policy("int8/int4", 2).layers == (mixed, mixed)
        layered = parse_policy("0-1:int8, 2:int8/int4, 3-4:int2", 5).layers
        assert layered == (SCHEMES["int8"],) * 2 + (mixed,) + (SCHEMES["int2"],) * 2
        assert mixed.name == "int8/int4"
        assert SCHEMES["int4"].name == "int4"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the KV cache dtype is empty; choose from bf16, int8"),
            ("fp7", "unknown KV cache dtype 'fp7'; choose from bf16, int8"),
            ("int8/fp7", "unknown KV cache dtype 'fp7' in 'int8/fp7'; choose from bf16"),
            ("0-3:fp7", "unknown KV cache dtype 'fp7' in '0-3:fp7'; choose from bf16"),
            ("int8,int4,int2", "'int8,int4,int2' names 3 dtypes; write one, or one for keys and one for values"),
            ("0-1:int8,int4", "'int4' in the policy '0-1:int8,int4' is not LAYER:DTYPE or FIRST-LAST:DTYPE"),
            ("a:int8", "'a:int8' in the policy 'a:int8' is not LAYER:DTYPE or FIRST-LAST:DTYPE"),
            ("0-4:int8", "'0-4:int8' in the policy '0-4:int8': the model's layers are 0 to 3"),
            ("2-1:int8", "'2-1:int8' in the policy '2-1:int8': the model's layers are 0 to 3"),
            ("0-2:int8,2-3:int4", "the policy '0-2:int8,2-3:int4' names layer 2 twice"),
            ("1:int8,3:int4", "the policy '1:int8,3:int4' says nothing of layer 0, 2"),
        ],
    )
    def test_messages(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_policy(text, 4)

    def test_a_layer_that_does_not_fit_is_named(self) -> None:
        layers = (LayerGeometry(2, 1, 64, 64, 0.1), LayerGeometry(2, 1, 24, 64, 0.1))
        with pytest.raises(UnsupportedError, match="layer 1 cannot be stored as 'int4': head size 24"):
            parse_policy("int4", 2).check(ModelGeometry("m", layers, 100, 10))

    def test_values_of_wide_heads_have_scales_for_64_channels(self) -> None:
        wide, narrow = LayerGeometry(4, 1, 256, 256, 0.1), LayerGeometry(4, 2, 128, 128, 0.1)
        latent = LayerGeometry(4, 1, 576, 512, 0.1, latent=True)
        odd = LayerGeometry(4, 1, 144, 144, 0.1)
        for layers, text, name in (
            ((wide,) * 3, "int4", "int4/int4b64"),
            ((wide,) * 3, "int8/int4", "int8/int4b64"),
            ((wide,) * 3, "int4+sink:int8", "int4/int4b64+sink:int8"),
            ((wide,) * 3, "int4/int4b32", "int4/int4b32"),
            ((narrow, wide, wide), "int4", "0:int4,1-2:int4/int4b64"),
            ((narrow, latent, odd), "int4", "int4"),
        ):
            policy = policy_of(text, ModelGeometry("m", layers, 100, 10), None)
            assert (policy.name, policy.label) == (name, text)
            assert policy.layers == parse_policy(name, 3).layers
            assert policy.sink == parse_policy(name, 3).sink
        # as many bits as heads of 64 take: a scale and a zero of 16 bits for every 64 elements
        geometry = ModelGeometry("m", (wide,) * 3, 100, 10)
        assert policy_of("int4", geometry, None).bits_per_element(geometry) == 4.5


WIDE = LayerGeometry(4, 4, 96, 96, 0.1)


@pytest.mark.parametrize(
    "dtype", [*(n for n, s in SCHEMES.items() if s.supports(WIDE) is None), "int8/int4", "0:int2,1-2:int8"]
)
def test_layers_lie_side_by_side_in_their_frames(dtype: str) -> None:
    layers = (LayerGeometry(4, 2, 64, 64, 0.1), LayerGeometry(4, 1, 128, 64, 0.1), WIDE)
    layout = PoolLayout.of(ModelGeometry("m", layers, 100, 10), parse_policy(dtype, 3))
    assert layout.sealed.frames == 1
    for page in (layout.sealed, layout.open):
        taken: set[tuple[int, int]] = set()
        for place, layer in zip(page.places, layers, strict=True):
            size = layer.num_kv_heads * sum(
                align(c.page_bytes(d))
                for c, d in ((place.scheme.key, layer.key_dim), (place.scheme.value, layer.value_dim))
            )
            assert place.offset % ALIGNMENT == 0
            assert place.offset + size <= layout.frame_bytes
            lines = {(place.frame, line) for line in range(place.offset, place.offset + size, ALIGNMENT)}
            assert not lines & taken
            taken |= lines
        assert page.used_bytes == len(taken) * ALIGNMENT
