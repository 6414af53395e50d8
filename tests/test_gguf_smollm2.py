"""The packaged model with scaling written into its header: as transformers' model with that scaling set by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, RopeScalingType

from kvbits.evaluation.documents import reference_text
from kvbits.models.locate import locate
from kvbits.models.reader import Reader

TOKENS = 512
FACTOR = 4.0


def rescaled(source: Path, target: Path, factor: float) -> None:
    """``source`` with a linear factor written into its header; tensors as they are."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(factor)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        logits = model(input_ids=ids.unsqueeze(0)).logits[0].float()
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item())


@pytest.mark.parametrize("factor", [4.0])
def test_a_linear_factor_in_the_header_is_obeyed(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = locate("smollm2-135m")
    assert source.gguf
    file = tmp_path / "scaled.gguf"
    rescaled(Path(source.path) / source.gguf, file, FACTOR)
    plain = Reader("smollm2-135m", source)
    model = plain.weights(torch.bfloat16)()
    ids = torch.tensor(plain.tokenizer()(reference_text()[:8000])["input_ids"][:TOKENS])
    without = perplexity(model, ids)
    model.model.rotary_emb.inv_freq /= FACTOR  # by hand: positions are divided by the factor
    by_hand = perplexity(model, ids)
    del model
    found = perplexity(Reader("scaled", locate(str(file))).weights(torch.bfloat16)(), ids)
    print(f"perplexity {without:.2f} without, {by_hand:.2f} by hand, {found:.2f} from the header")
    assert by_hand > 4 * without
    assert found == pytest.approx(by_hand, rel=1e-3)
