"""What ``kvbits plan`` says a memory holds, against what the engine really admits and takes.

    python benchmarks/plan_check.py smollm2-135m --context 1024 --memory 96MiB --json out/plan-check.json

For each dtype as many prompts of ``--context`` tokens as are planned, and a few more, go to an engine with exactly the
planned bytes of cache. All prompts are computed in one step, so that admission is what is seen, not the growth of those
that already decode. Reported: sessions planned and admitted, and frames of a session planned and held.
"""

from __future__ import annotations

from report import Row, facts_of, plain_parser, publish

from kvbits.config import WATERMARK, parse_bytes
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.models import load_model
from kvbits.planning import plan

MORE = 3


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--context", type=int, nargs="+", default=[500, 1024])
    parser.add_argument("--memory", default="64MiB")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4", "int4+sink:int8"])
    args = parser.parse_args()
    loaded = load_model(args.model)
    memory = parse_bytes(args.memory)
    rows: list[Row] = []
    for dtype in args.dtype:
        policy = loaded.policy(dtype)
        (scheme,) = plan(loaded.geometry, [policy], memory, args.context, watermark=WATERMARK).schemes
        for at in scheme.contexts:
            count = at.sessions + MORE
            engine = Engine(
                loaded,
                EngineConfig(
                    kv_cache_dtype=policy,
                    kv_cache_memory=memory,
                    max_num_seqs=count,
                    max_num_batched_tokens=count * at.context,
                ),
            )
            for session in range(count):
                # of the middle of the vocabulary, where no special tokens are
                vocab = loaded.geometry.vocab_size
                prompt = [vocab // 4 + (session * 7919 + i * 31) % (vocab // 2) for i in range(at.context)]
                engine.add_request(prompt, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
            engine.step()
            stats = engine.pages.stats()
            running = engine.load().running
            rows.append(
                {
                    "dtype": dtype,
                    "context": at.context,
                    "sessions_planned": at.sessions,
                    "admitted_planned": at.admitted,
                    "admitted": running,
                    "frames_planned": at.session_bytes // scheme.frame_bytes,
                    "frames_held": (stats.open + stats.sealed) / running,
                }
            )
            print(rows[-1], flush=True)
    publish("Planned and admitted", {"rows": rows}, facts_of(args), args.json)


if __name__ == "__main__":
    main()
