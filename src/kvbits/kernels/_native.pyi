from collections.abc import Sequence
from typing import Any

MAX_DIM: int
STRIP_OUTPUTS: int
PAGE_TOKENS: int
SPLIT_PAGES: int

def available_isas() -> Sequence[str]: ...

class Place:
    def __init__(
        self, key_codec: int, value_codec: int, frame: int, offset: int, head_bytes: int, value_offset: int
    ) -> None: ...

class Layer:
    def __init__(
        self,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        scale: float,
        softcap: float,
        window: int,
        sealed: Place,
        open: Place,
        sink: Place | None,
        frame_bytes: int,
        buffer: int,
        key_feedback: int,
        value_feedback: int,
        key_clip: int,
        value_clip: int,
        key_order: int,
        value_order: int,
        latent: bool,
    ) -> None: ...

class Batch:
    def __init__(
        self, starts: Any, counts: Any, rows: Any, sealed: Any, head: Any, tail: Any, sink: Any, draft: Any
    ) -> None: ...

class Cpu:
    def __init__(self, isa: str, threads: int, gomp_parallel: int) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def codecs(self) -> list[tuple[int, bool, bool]]: ...
    def many_rows(self) -> list[tuple[int, bool, bool]]: ...
    def supports(self, key_codec: int, value_codec: int) -> str | None: ...
    def opens_latents(self, codec: int) -> bool: ...
    def forward(self, layer: Layer, batch: Batch, *arguments: Any) -> None: ...

class Coded:
    def __init__(
        self,
        codec: int,
        key: bool,
        pages: int,
        heads: int,
        dim: int,
        rows: int,
        row: int,
        head: int,
        sealed: int,
        page_bytes: int,
        head_bytes: int,
    ) -> None: ...

def encode(cpu: Cpu, coded: Coded, feedback: int, order: int, clip: int) -> bool: ...
def decode(cpu: Cpu, coded: Coded) -> bool: ...
def row_kernels(isa: str) -> str: ...
def product_kernels(isa: str) -> str: ...

class Linear:
    def __init__(self, format: int, bias: Any, out_features: int, in_features: int) -> None: ...
    @property
    def strips(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def part(self, first: int, out_features: int) -> Linear: ...
    def fill(self, stored: int, row_bytes: int, order: int, first: int, last: int) -> None: ...
    def unpack(self, rows: int, count: int, out: int) -> None: ...
    def apply(self, cpu: Cpu, x: int, stride: int, rows: int, y: int) -> None: ...

class Gate:
    def __init__(self, activation: int, alpha: float, limit: float) -> None: ...

class Experts:
    def __init__(self, gates: Sequence[Linear], ups: Sequence[Linear], downs: Sequence[Linear], gate: Gate) -> None: ...
    def add(self, cpu: Cpu, x: int, rows: int, count: int, chosen: int, shares: int, sums: int) -> None: ...

class Mixture:
    def __init__(self, router: Linear, experts: Experts, chosen: int, among_chosen: bool) -> None: ...

class DecoderLayer:
    def __init__(
        self,
        query: Linear,
        key: Linear,
        value: Linear,
        output: Linear,
        gate: Linear | None,
        up: Linear | None,
        down: Linear | None,
        mixture: Mixture | None,
        input_norm: Any,
        attention_norm: Any,
        mlp_norm: Any,
        output_norm: Any,
        query_norm: Any,
        key_norm: Any,
        sinks: Any,
        rope: int,
    ) -> None: ...

class Decoder:
    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        dim: int,
        rotated: int,
        eps: float,
        soft_cap: float,
        gate: Gate,
        layers: Sequence[DecoderLayer],
        final_norm: Any,
        head: Linear,
    ) -> None: ...
    def forward(
        self,
        cpu: Cpu,
        layers: Sequence[Layer],
        tables: Batch,
        rows: int,
        embedded: int,
        cos: int,
        sin: int,
        wanted: int,
        count: int,
        logits: int,
    ) -> None: ...
