"""One vLLM engine in a process of its own: ``python engine_process.py JOB OUT``, both JSON.

A job has ``engine`` (arguments of ``vllm.LLM``) and ``rounds``, each with ``prompts`` (token ids) and ``params``
(of ``SamplingParams``). The answer has the rounds' tokens and log-probabilities and the engine's counters after each.
With ``record`` (arguments of ``Recorder.record``) the rows of the requests are replayed in the worker, see recorder.py;
prompts of later rounds that equal one of an earlier round found their beginning in the cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    recording = {"worker_extension_cls": "recorder.Recorder"} if "record" in job else {}
    llm = LLM(**job["engine"], **recording, disable_log_stats=False)
    if recording:
        llm.collective_rpc("record", kwargs=job["record"])
    rounds, replayed = [], []
    first: dict[tuple[int, ...], str] = {}
    lengths: dict[str, int] = {}
    prefixes: dict[str, str] = {}
    for one in job["rounds"]:
        prompts = [{"prompt_token_ids": ids} for ids in one["prompts"]]
        found = llm.generate(prompts, SamplingParams(**one["params"]), use_tqdm=False)
        for ids, output in zip(one["prompts"], found, strict=True):
            for number, answer in enumerate(output.outputs):
                name = output.request_id if len(output.outputs) == 1 else f"{number}_{output.request_id}"
                # the last token was sampled, and not run through the model
                lengths[name] = len(ids) + len(answer.token_ids) - 1
                prefixes[name] = first.setdefault(tuple(ids), name)
        rounds.append({"answers": [_answer(o) for o in found], "counters": _counters(llm)})
    if recording:
        replayed = llm.collective_rpc("replay", args=(lengths, prefixes))
    Path(sys.argv[2]).write_text(json.dumps({"rounds": rounds, "replayed": replayed}))


def _answer(output: Any) -> dict[str, Any]:
    prompt = output.prompt_logprobs
    return {
        "tokens": [list(one.token_ids) for one in output.outputs],
        "logprobs": [[_named(p) for p in one.logprobs or ()] for one in output.outputs],
        "prompt_logprobs": None if prompt is None else [p and _named(p) for p in prompt],
    }


def _named(logprobs: Any) -> dict[str, float]:
    return {str(token): entry.logprob for token, entry in logprobs.items()}


def _counters(llm: Any) -> dict[str, float]:
    found = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if value is not None and not metric.name.startswith("vllm:request_success"):
            found[metric.name.removeprefix("vllm:")] = value
    return found


if __name__ == "__main__":
    main()
