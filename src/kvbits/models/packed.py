"""Linear layers and embeddings with their weights in the order in which kvbits' kernels read them.

A decode step multiplies a few rows with every weight, so it must read each of them once, in order, and do little else;
and a row's result must not depend on the rows beside it, which libraries do not promise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from kvbits.kernels.experts import Gate
from kvbits.kernels.products import PackedWeight, Products
from kvbits.models.experts import PackedExperts, experts_parts, gate_of, pack_experts
from kvbits.models.stored import StoredParameter, settled
from kvbits.weights import ROUNDED, WeightFormat

_ROUNDED_ROWS = 4096
_TRIED_ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 127, 200, 512)


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference; ``x`` is ``bfloat16 [..., in]``, the result ``[..., out]``."""

    def __init__(self, weight: PackedWeight, products: Products) -> None:
        super().__init__()
        self.weight = weight
        self.products = products

    def forward(self, x: Tensor) -> Tensor:
        return self.products.apply(self.weight, x)


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` whose rows are unpacked when they are asked for, as ``bfloat16``, times ``scale``."""

    scale: Tensor | None

    def __init__(self, weight: PackedWeight, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.unpack(ids).to(torch.bfloat16).view(*ids.shape, -1)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)


def is_embedding(layer: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether :func:`packed_embedding` can take the layer's place: torch's own, or Gemma's, which scales."""
    return type(layer) is nn.Embedding or (isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale"))


def packed_embedding(layer: nn.Embedding, weight: PackedWeight) -> PackedEmbedding:
    """``layer`` on packed rows."""
    return PackedEmbedding(weight, getattr(layer, "embed_scale", None))


def pack_linears(model: nn.Module, weights: str = "bf16") -> int:
    """Replace the bfloat16 linear layers and experts of ``model`` on the CPU; returns how many linear layers were.

    ``weights`` is what they are rounded to (:data:`kvbits.weights.ROUNDED`). An embedding that shares its weight with a
    layer then shares the packed one, and in bits every embedding is packed. Layers of another type (subclasses,
    quantized ones) and other dtypes stay as they are, as do all where the processor has only our portable kernels,
    which are slower than torch's (unless another format is asked for).
    """
    products, weight_format = Products(), ROUNDED[weights]
    if products.name == "scalar" and weights == "bf16":
        return 0
    shared: dict[int, PackedWeight] = {}
    embeddings = {id(module.weight) for module in model.modules() if is_embedding(module)}
    places = _places(model, _packs)
    for parent, name in places:  # a packed layer's weight goes at once
        layer = getattr(parent, name)
        weight = _packed(products, layer.weight, layer.bias, weight_format)
        if id(layer.weight) in embeddings:
            shared[id(layer.weight)] = weight
        setattr(parent, name, PackedLinear(weight, products))
    for parent, name in _places(model, _packs_experts):
        module = getattr(parent, name)
        setattr(parent, name, pack_experts(module, gate_of(module) or Gate(), products, weight_format))
    for parent, name in _places(model, is_embedding):
        layer = getattr(parent, name)
        found = shared.get(id(layer.weight))
        if found is None and packs(layer, weights):
            found = _packed(products, layer.weight, None, weight_format)
        if found is not None:
            setattr(parent, name, packed_embedding(layer, found))
    return len(places)


def _packed(products: Products, weight: Tensor, bias: Tensor | None, weight_format: WeightFormat) -> PackedWeight:
    if isinstance(weight, StoredParameter):
        return products.pack(weight, bias, weight_format, weight.read, weight.release)
    return products.pack(weight, bias, weight_format)


@torch.no_grad()
def round_linears(model: nn.Module, weights: str) -> None:
    """Give linear layers and embeddings of ``model`` the values that :func:`pack_linears` would, in their own dtype."""
    weight_format = ROUNDED[weights]
    seen: set[int] = set()
    for module in model.modules():
        for weight in _rounded(module):
            if weight.data_ptr() not in seen:
                seen.add(weight.data_ptr())
                for part in weight.split(_ROUNDED_ROWS):
                    part.copy_(weight_format.decode(weight_format.encode(part))[:, : part.shape[1]])


def _rounded(module: Any) -> Iterator[Tensor]:
    if type(module) is nn.Linear or is_embedding(module):
        yield module.weight
    elif gate_of(module) is not None:
        for index in range(len(module.gate_up_proj)):
            yield from (weight for weight, _ in experts_parts(module, index))


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Make ordinary parameters, as ``dtype``, of the :class:`StoredParameter` whose layers were not packed."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, StoredParameter):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(settled(parameter, dtype))
                module.register_parameter(name, made[id(parameter)])


def is_packed_later(layer: nn.Module) -> bool:
    """Whether :func:`pack_linears` may take parameters of ``layer`` in any type, as :class:`StoredParameter`."""
    return (
        (type(layer) is nn.Linear and layer.in_features % 2 == 0) or is_embedding(layer) or gate_of(layer) is not None
    )


def packs(layer: nn.Module, weights: str) -> bool:
    """Whether :func:`pack_linears` packs the weights of ``layer``, whatever it shares with other layers. It may be one
    without memory."""
    if is_embedding(layer):
        return weights != "bf16" and _of_16_bits(layer.weight)
    return _packs(layer) or _packs_experts(layer)


def _of_16_bits(weight: Tensor) -> bool:
    if isinstance(weight, StoredParameter):
        return True
    return weight.dtype == torch.bfloat16 and weight.device.type in ("cpu", "meta")


def _places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str]]:
    return [(parent, name) for parent in model.modules() for name, child in parent.named_children() if wanted(child)]


def _packs(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and _of_16_bits(layer.weight) and layer.in_features % 2 == 0


def _packs_experts(module: Any) -> bool:
    return gate_of(module) is not None and _of_16_bits(module.gate_up_proj)


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """The packed weights of ``model`` by their parameters' names, shared ones once, each expert's by itself."""
    yield from _packed_layers(model)
    for name, module in _packed_experts(model):
        yield from ((f"{name}.{part}.weight", weight) for part, weight in module.packed())


def packed_parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]]:
    """transformers' parameters that are packed, shared ones once: name, shape, and what unpacks rows ``int64 [n]`` (all
    dimensions but the last counted together; a bias is one row)."""
    for name, weight in _packed_layers(model):
        yield name, (weight.out_features, weight.in_features), weight.unpack
        if weight.bias is not None:
            yield f"{name.removesuffix('weight')}bias", tuple(weight.bias.shape), weight.bias.unsqueeze(0).__getitem__
    for name, module in _packed_experts(model):
        yield from ((f"{name}.{part}", shape, rows) for part, shape, rows in module.stored())


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight: Any = module.weight if isinstance(module, PackedLinear | PackedEmbedding) else None
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            yield f"{name}.weight", weight


def _packed_experts(model: nn.Module) -> Iterator[tuple[str, PackedExperts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts))


def depends_on_rows(model: nn.Module, fused: bool = False, apart: Collection[nn.Module] = ()) -> str | None:
    """``None`` when every layer that multiplies gives a row the same bits for any number of rows; else the one that
    does not.

    Each shape and format of layer is tried once, on random rows. ``fused``: only packed weights multiply. ``apart``:
    modules that always run on one row.
    """
    tried = set()
    for name, layer in model.named_modules():
        if layer in apart:
            continue
        if isinstance(layer, nn.Linear):
            return f"the linear layer '{name}' is not packed"
        kind = _kind(layer)
        if kind is None:
            own = [p for p in layer.parameters(recurse=False) if p.ndim > 1]
            if own and not fused and not isinstance(layer, nn.Embedding):
                return f"the layer '{name}' multiplies in transformers' own code"
        elif kind not in tried:
            tried.add(kind)
            rows = _differing_rows(layer)
            if rows:
                return f"the layer '{name}' rounds differently for {rows} and {_TRIED_ROWS[-1]} rows"
    return None


def _kind(layer: nn.Module) -> tuple[Any, ...] | None:
    """What layers have in common that one trial stands for; ``None`` for those that do not multiply packed weights."""
    if isinstance(layer, PackedLinear):
        weights = [layer.weight]
    elif isinstance(layer, PackedExperts):
        weights = [weight for _, weight in layer.packed()]
    else:
        return None
    return len(weights), *sorted({(w.out_features, w.in_features, w.weight_format.name) for w in weights})


@torch.no_grad()
def _differing_rows(layer: Any) -> int | None:
    """A number of rows whose results are other bits than among more rows."""
    generator, most = torch.Generator().manual_seed(0), _TRIED_ROWS[-1]
    experts = layer.experts if isinstance(layer, PackedExperts) else None
    width = layer.weight.in_features if experts is None else experts.gates[0].in_features
    given = [torch.randn(most, width, generator=generator).to(torch.bfloat16)]
    if experts is not None:
        given.append(torch.rand(most, len(experts), generator=generator).argsort(1)[:, : min(2, len(experts))])
        given.append(torch.rand(given[1].shape, generator=generator))
    whole = layer(*given)
    return next((n for n in _TRIED_ROWS if not torch.equal(layer(*(part[:n] for part in given)), whole[:n])), None)
