"""Decode speed with and without speculation, on texts that repeat their prompt: agent traces, code edits.

    python benchmarks/speculation.py smollm2-135m DATA... --kv-cache-dtype int8 --json out/speculation.json

DATA are files: an OpenAI request (``.json``, ``messages``), a SWE-agent trajectory (``.traj``, ``history``), or any
other text, for example source code. A conversation gives a prompt for each of its later turns, cut at the front to fit;
a text gives one: print it again with a small change. Both engines hold the same model and answer every prompt in turn,
alternating; decode speed counts the tokens after the first and the time of their steps. The table has a row a file:
the median speed of each over runs, their ratio, the share of guesses kept, whether the tokens were the same, and, since
small models like to repeat themselves, how much of the answers stands in the prompt and how much is a repetition of the
answer itself (runs of eight tokens).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Row, bars, facts_of, plain_parser, publish

from kvbits.config import parse_bytes
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.engine.text import encode_chat
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel, load_model

RUN = 8
"""Tokens in a row that count as copied."""

EDIT = "Add a comment to the first function and print the whole file again."


@dataclass
class Answer:
    """One prompt through one engine."""

    tokens: list[int]
    seconds: float

    @property
    def speed(self) -> float:
        return (len(self.tokens) - 1) / self.seconds


def prompts_of(loaded: LoadedModel, path: Path, most: int, turns: int) -> list[list[int]]:
    """Token ids of the prompts of one file, each of at most ``most`` tokens."""
    content = path.read_text(encoding="utf-8")
    if path.suffix not in (".json", ".traj"):
        tokens = loaded.tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        text = loaded.tokenizer.decode(tokens[: most - 100])
        return [encode_chat(loaded, [{"role": "user", "content": f"```\n{text}\n```\n{EDIT}"}])]
    document = json.loads(content)
    messages = [_plain(m) for m in document.get("messages") or document["history"]]
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 1] or [len(messages)]
    chosen = ends[-turns:] if len(ends) <= turns else [ends[(i + 1) * len(ends) // turns - 1] for i in range(turns)]
    return [encode_chat(loaded, messages[:end])[-most:] for end in chosen]


def _plain(message: dict[str, Any]) -> dict[str, str]:
    """A message as plain text, tool calls and results included."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part.get("text", "") for part in content)
    calls = "".join(json.dumps(call.get("function", call)) for call in message.get("tool_calls") or ())
    role = message["role"] if message["role"] in ("system", "user", "assistant") else "user"
    return {"role": role, "content": content + calls}


def answer(engine: Engine, prompt: list[int], params: SamplingParams) -> Answer:
    """Run one request; the time is that of all steps after the first token."""
    engine.add_request(prompt, params, request_id="one")
    found, seconds = Answer([], 0.0), 0.0
    while engine.has_unfinished():
        began = bool(found.tokens)
        begin = time.perf_counter()
        deltas = engine.step()
        seconds += (time.perf_counter() - begin) if began else 0.0
        for delta in deltas:
            if delta.error is not None:
                raise SystemExit(delta.error)
            found.tokens.extend(delta.token_ids)
    found.seconds = seconds
    return found


def copied(prompt: list[int], tokens: list[int]) -> tuple[float, float]:
    """Shares of ``tokens`` in a run of eight that the prompt has, and in one that they had before themselves."""
    known = {tuple(prompt[i : i + RUN]) for i in range(len(prompt) - RUN + 1)}
    seen: set[tuple[int, ...]] = set()
    quoted, repeated = [False] * len(tokens), [False] * len(tokens)
    for i in range(len(tokens) - RUN + 1):
        run = tuple(tokens[i : i + RUN])
        if run in known:
            quoted[i : i + RUN] = [True] * RUN
        if run in seen:
            repeated[i : i + RUN] = [True] * RUN
        seen.add(run)
    return sum(quoted) / len(tokens), sum(repeated) / len(tokens)


def measure(loaded: LoadedModel, path: Path, arguments: argparse.Namespace, engines: dict[str, Engine]) -> Row:
    """One file on both engines; each prompt ``runs`` times, alternating."""
    params = SamplingParams(max_tokens=arguments.new_tokens, temperature=0.0, ignore_eos=True)
    before = dict(vars(engines["on"].stats.speculation))
    speeds: dict[str, list[float]] = {"off": [], "on": []}
    same, shares = [], []
    for prompt in prompts_of(loaded, path, arguments.context - arguments.new_tokens, arguments.turns):
        runs: dict[str, list[Answer]] = {"off": [], "on": []}
        for number in range(arguments.runs):
            for name in ("off", "on") if number % 2 else ("on", "off"):
                runs[name].append(answer(engines[name], prompt, params))
        for name, found in runs.items():
            speeds[name].append(statistics.median(a.speed for a in found))
        same.append(runs["off"][0].tokens == runs["on"][0].tokens)
        shares.append(copied(prompt, runs["off"][0].tokens))
    after = vars(engines["on"].stats.speculation)
    guessed, kept, drafts = (after[k] - before[k] for k in ("draft_tokens", "accepted_tokens", "drafts"))
    ratios = [on / off for on, off in zip(speeds["on"], speeds["off"], strict=True)]
    return {
        "text": path.name,
        "prompts": len(same),
        "off tok/s": statistics.median(speeds["off"]),
        "on tok/s": statistics.median(speeds["on"]),
        "speed-up": statistics.median(ratios),
        "lowest": min(ratios),
        "guesses kept": kept / guessed if guessed else 0.0,
        "tokens a guess": 1 + kept / drafts if drafts else 1.0,
        "same tokens": f"{sum(same)}/{len(same)}",
        "from the prompt": statistics.mean(s[0] for s in shares),
        "own repetition": statistics.mean(s[1] for s in shares),
    }


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--kv-cache-dtype", default="int8")
    parser.add_argument("--kv-cache-memory", default="512MiB")
    parser.add_argument("--speculative-config", default="ngram", help="a method, or JSON")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=4096, help="prompt and answer")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=4, help="prompts of a conversation")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    speculative = SpeculativeConfig.of(arguments.speculative_config)
    if speculative is None or arguments.new_tokens < RUN or arguments.context <= arguments.new_tokens + 128:
        raise ConfigError("--new-tokens must be at least 8, and --context over it by more than 128")
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    config = EngineConfig(
        kv_cache_dtype=arguments.kv_cache_dtype, kv_cache_memory=parse_bytes(arguments.kv_cache_memory)
    )
    engines = {"off": Engine(loaded, config), "on": Engine(loaded, config, speculative=speculative)}
    rows = []
    for path in arguments.data:
        print(f"{path.name} ...", flush=True)
        rows.append(measure(loaded, path, arguments, engines))
    title = f"Speculation ({speculative.method}), one sequence"
    publish(
        title, {"rows": rows}, facts_of(arguments, "data"), arguments.json, bars(title, rows, ["text"], "speed-up"),
        picture=arguments.picture, speculation=engines["on"].stats.speculation.as_json(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
