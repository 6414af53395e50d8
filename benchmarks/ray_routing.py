"""How much of a chat's prompt is found in the cache: one server, two replicas routed by prefix, two routed at random.

    python benchmarks/ray_routing.py --json out/ray_routing.json --chat questions.jsonl

The chats are held at once, each with the stock OpenAI client, every second turn streamed; an answer becomes part of the
next prompt. The replies of every case are compared with the single server's.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from loads import Stored
from openai import OpenAI
from report import Row
from servers import Serving, common_arguments, kvbits_command, serving
from tqdm import tqdm

SINGLE, PREFIX, RANDOM = "one server", "by prefix", "at random"


def chats_of(path: Path, chats: int, turns: int) -> list[list[str]]:
    """The file's questions one after another, ``turns`` of them for each chat."""
    questions = [turn for line in path.read_text("utf-8").splitlines() for turn in json.loads(line)["turns"]]
    if len(questions) < chats * turns:
        raise SystemExit(f"'{path}' has {len(questions)} questions; {chats} chats of {turns} turns need more")
    return [questions[number * turns : (number + 1) * turns] for number in range(chats)]


def ask(client: OpenAI, body: dict[str, Any], stream: bool) -> tuple[str, int, int]:
    """An answer, its prompt's tokens, and those that were cached."""
    if not stream:
        whole = client.chat.completions.create(**body)
        text, usage = whole.choices[0].message.content, whole.usage
    else:
        pieces, usage = [], None
        for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage
        text = "".join(pieces)
    return text or "", usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0


def hold(url: str, model: str, chat: Sequence[str], new_tokens: int, bar: Any) -> Row:
    """One chat from its first question to its last."""
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600)
    messages: list[dict[str, str]] = []
    replies, prompt, cached = [], 0, 0
    for turn, question in enumerate(chat):
        messages.append({"role": "user", "content": question})
        body = {"model": model, "messages": messages, "max_tokens": new_tokens, "temperature": 0}
        text, tokens, found = ask(client, body, stream=turn % 2 == 1)
        messages.append({"role": "assistant", "content": text})
        replies.append(text)
        prompt, cached = prompt + tokens, cached + found
        bar.update()
    return {"replies": replies, "prompt_tokens": prompt, "cached_tokens": cached}


def by_replica(server: Serving) -> list[int]:
    """Prompt tokens that each replica computed or found."""
    page = httpx.get(server.target.url + "/metrics", timeout=600).text
    found = re.findall(r"^vllm:prompt_tokens_total\{.*\} (\S+)$", page, re.MULTILINE)
    return sorted((round(float(value)) for value in found), reverse=True)


def run_case(command: list[str], replicas: int, chats: Sequence[Sequence[str]], args: argparse.Namespace) -> Row:
    with serving(command) as server, tqdm(total=sum(map(len, chats)), unit="turn", leave=False) as bar:
        # The first replica answers while others still load the model.
        while len(by_replica(server)) < replicas:
            time.sleep(0.5)
        with ThreadPoolExecutor(len(chats)) as pool:
            rows = list(pool.map(lambda c: hold(server.target.url, args.model, c, args.new_tokens, bar), chats))
        return {"chats": rows, "by_replica": by_replica(server)}


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--chat", type=Path, required=True, help="questions with 'turns' (MT-Bench)")
    parser.add_argument("--chats", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kv-cache-dtype", default="int4")
    args = parser.parse_args()
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k != "json"})
    chats = chats_of(args.chat, args.chats, args.turns)
    flags = ["--kv-cache-dtype", args.kv_cache_dtype, "--kv-cache-memory", args.kv_cache_memory]
    # What is computed beside a request does not change its tokens: replies can be compared.
    flags += ["--threads", str(args.threads), "--batch-invariant"]
    ray = ["--ray", "--ray-replicas", str(args.replicas), "--ray-routing"]
    for name, more in ((SINGLE, []), (PREFIX, [*ray, "prefix"]), (RANDOM, [*ray, "random"])):
        if not stored.has(name):
            command = kvbits_command(args.model, *flags, *more)
            stored.add(name, run_case(command, args.replicas if more else 1, chats, args))
    rows = []
    alone = [chat["replies"] for chat in stored.cases[SINGLE]["chats"]]
    share: dict[str, float] = {}
    for name in (SINGLE, PREFIX, RANDOM):
        found = stored.cases[name]["chats"]
        prompt, cached = (sum(chat[kind] for chat in found) for kind in ("prompt_tokens", "cached_tokens"))
        share[name] = cached / prompt
        pairs = [
            (ours, theirs)
            for chat, other in zip(found, alone, strict=True)
            for ours, theirs in zip(chat["replies"], other, strict=True)
        ]
        rows.append(
            {
                "routing": name,
                "prompt tokens": prompt,
                "cached tokens": cached,
                "cached, %": round(100 * share[name], 1),
                "of one server's, %": round(100 * share[name] / share[SINGLE], 1),
                "prompt tokens by replica": " + ".join(map(str, stored.cases[name]["by_replica"])),
                "same replies": f"{sum(a == b for a, b in pairs)} of {len(pairs)}",
            }
        )
    stored.finish(f"{args.chats} chats of {args.turns} turns: what the cache holds, by routing", rows)


if __name__ == "__main__":
    main()
