"""What it costs to multiply a model's weights in bits: KL to the same file, unpacked to float32.

    python benchmarks/weight_quality.py smollm2-135m --weights auto int8 int4 --json out/weight_quality.json

The model in float32 reads each window first; then the forms of ``--weights`` do, one after another, in bfloat16, as
they are served, and checkpoints of the same model (``--checkpoint``), such as ``kvbits quantize`` writes. Caches are in
16 bit, and the second half of each window is scored. Most memory is needed in float32: four bytes a weight.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from report import Row, facts_of, note, publish
from torch import Tensor

from kvbits.cli.session import tokens_of
from kvbits.config import WEIGHT_FORMATS
from kvbits.evaluation.compare import REFERENCE, engine_for
from kvbits.evaluation.documents import reference_text
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.windows import cut_windows, read_text
from kvbits.models import LoadedModel, load_model


def read(loaded: LoadedModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits ``float32 [rows, vocab]`` of each window's second half, but for its last row."""
    context = len(windows[0])
    engine = engine_for(loaded, loaded.policy(REFERENCE), 1, context)
    parts = ([logits for _, logits in engine.teacher_forced(window, context // 2)] for window in windows)
    return [torch.cat(part)[: context - 1 - context // 2] for part in parts]


def row_of(weights: str, found: list[Tensor], reference: list[Tensor], windows: Sequence[Sequence[int]]) -> Row:
    context, record = len(windows[0]), Fidelity()
    for own, exact, window in zip(found, reference, windows, strict=True):
        record.add(exact, own, torch.tensor(window[context // 2 + 1 :]), context // 2)
    s = record.summary()
    return {
        "weights": weights, "kl": s.kl_mean, "kl_p99": s.kl_p99, "same_top_token": s.top1_agreement,
        "perplexity": s.perplexity, "perplexity_float32": s.perplexity_16bit, "tokens": s.tokens,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", nargs="+", choices=WEIGHT_FORMATS, default=["auto"])
    parser.add_argument("--checkpoint", nargs="*", default=[], metavar="DIR", help="run in its own bits")
    parser.add_argument("--text", type=Path, help="default: Python's language reference")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path("out/weight_quality.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model, "float32", note)
    text = reference_text() if args.text is None else read_text(args.text)
    windows = cut_windows(tokens_of(loaded, text[: 16 * args.window * args.windows]), args.window, args.windows)
    reference = read(loaded, windows)
    rows = []
    forms = [(args.model, weights, weights) for weights in args.weights]
    for model, weights, label in [*forms, *((path, "auto", path) for path in args.checkpoint)]:
        del loaded
        gc.collect()
        loaded = load_model(model, "bfloat16", note, weights)
        rows.append(row_of(label, read(loaded, windows), reference, windows))
    publish("Weights in bits against float32", {"rows": rows}, facts_of(args, "json"), args.json)


if __name__ == "__main__":
    main()
