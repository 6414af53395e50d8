"""A growing agent session and a chat of several turns, with prefix caching and without.

    python benchmarks/agent_sessions.py --json out/sessions.json --agent session.json --chat questions.jsonl

The agent's turns are the prompts before each of its recorded answers (tools left out), as far as they fit the context;
the chat asks the file's questions one after another, with the model's own answers between them. For every turn:
pages reused of those that an earlier turn has left, and the time to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import httpx
from loads import Stored
from report import Row
from servers import Serving, common_arguments, kvbits_command, serving
from tqdm import tqdm

from kvbits.replay.run import LoadShape, body_of
from kvbits.replay.send import Record, send
from kvbits.replay.target import Target
from kvbits.replay.trace import TraceRequest, read_trace

PAGE = 64
Messages = list[dict[str, Any]]


def agent_turns(path: Path) -> list[Messages]:
    """The message lists before each recorded answer of the agent, without what the template does not take."""
    messages = json.loads(path.read_text("utf-8"))["messages"]
    keep = ("role", "content", "tool_calls", "tool_call_id", "name")
    plain = [{key: value for key, value in m.items() if key in keep and value is not None} for m in messages]
    ends = [i for i, m in enumerate(plain) if m["role"] == "assistant" and i] + [len(plain)]
    return [plain[:end] for end in ends if plain[end - 1]["role"] != "assistant"]


def common_prefix(one: list[int], two: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


class Session:
    """One conversation with one server, turn after turn."""

    def __init__(self, server: Serving, new_tokens: int) -> None:
        self._target: Target = server.target
        self._new_tokens = new_tokens
        self._before: list[int] = []
        self._answered = 0
        self.rows: list[Row] = []

    def turn(self, messages: Messages, own_answer: bool) -> str | None:
        """Ask; ``None`` when prompt and answer do not fit the context. ``own_answer``: the last answer is in it."""
        tokens = self._target.tokenize_chat(messages)
        if len(tokens) + self._new_tokens > (self._target.context or 0):
            return None
        shared = common_prefix(self._before, tokens)
        if own_answer and shared == len(self._before):
            # What was generated is stored too, all but its last token, where the template repeats it unchanged.
            shared = min(shared + self._answered - 1, len(tokens))
        record = asyncio.run(self._ask(messages))
        if record.error is not None:
            raise SystemExit(f"turn {len(self.rows) + 1} failed: {record.error}")
        could = min(shared // PAGE, (len(tokens) - 1) // PAGE)
        self.rows.append(
            {
                "turn": len(self.rows) + 1,
                "prompt_tokens": record.prompt_tokens,
                "pages_reusable": could,
                "pages_reused": (record.cached_tokens or 0) // PAGE,
                "ttft": record.first,
                "digest": record.digest,
            }
        )
        self._before, self._answered = tokens, record.output_tokens
        return record.text

    async def _ask(self, messages: Messages) -> Record:
        record = Record(len(self.rows), 0.0)
        request = TraceRequest(0.0, 0, self._new_tokens)
        extra = (("temperature", 0.0),)
        path, body = body_of(self._target, request, messages, LoadShape(extra=extra))
        async with self._target.client(3600) as http:
            await send(http, self._target.url + path, body, record)
        return record


def run_agent(server: Serving, path: Path, new_tokens: int, most: int) -> list[Row]:
    session = Session(server, new_tokens)
    for messages in tqdm(agent_turns(path)[:most], desc="agent", leave=False):
        if session.turn(messages, own_answer=False) is None:
            break
    return session.rows


def run_chat(server: Serving, path: Path, new_tokens: int, turns: int) -> list[Row]:
    session = Session(server, new_tokens)
    messages: list[dict[str, Any]] = []
    questions = [r.messages[0]["content"] if r.messages else r.prompt for r in read_trace(path)[:turns]]
    for question in tqdm(questions, desc="chat", leave=False):
        messages = [*messages, {"role": "user", "content": question}]
        answer = session.turn(messages, own_answer=len(messages) > 1)
        if answer is None:
            break
        messages.append({"role": "assistant", "content": answer})
    return session.rows


def warm(server: Serving) -> None:
    """A first request pays for what is set up on first use."""
    body = {"prompt": "Hello", "max_tokens": 2}
    httpx.post(server.target.url + "/v1/completions", json=body, timeout=300).raise_for_status()


def merged(on: list[Row], off: list[Row]) -> list[Row]:
    return [
        {
            "turn": a["turn"],
            "prompt tokens": a["prompt_tokens"],
            "pages reusable": a["pages_reusable"],
            "pages reused": a["pages_reused"],
            "ttft cached, ms": round(1000 * a["ttft"], 1),
            "ttft uncached, ms": round(1000 * b["ttft"], 1),
            "times faster": b["ttft"] / a["ttft"],
            "same answer": a["digest"] == b["digest"],
        }
        for a, b in zip(on, off, strict=True)
    ]


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--agent", type=Path, required=True, help="an OpenAI request body with the whole session")
    parser.add_argument("--chat", type=Path, required=True, help="questions (MT-Bench, prompts, or chats)")
    parser.add_argument("--turns", type=int, default=10, help="of the chat")
    parser.add_argument("--agent-turns", type=int, default=1000, metavar="N", help="at most; default all that fit")
    parser.add_argument("--new-tokens", type=int, default=32, help="of the agent's answers")
    parser.add_argument("--chat-tokens", type=int, default=256, help="most of a chat's answers")
    parser.add_argument("--kv-cache-dtype", default="int4")
    parser.add_argument("--batch-invariant", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k != "json"})
    flags = ["--kv-cache-dtype", args.kv_cache_dtype, "--kv-cache-memory", args.kv_cache_memory]
    flags += ["--threads", str(args.threads)] + (["--batch-invariant"] if args.batch_invariant else [])
    for name, more in (("cached", []), ("uncached", ["--no-enable-prefix-caching"])):
        if stored.has(name):
            continue
        with serving(kvbits_command(args.model, *flags, *more)) as server:
            warm(server)
            agent = run_agent(server, args.agent, args.new_tokens, args.agent_turns)
            stored.add(name, {"agent": agent, "chat": run_chat(server, args.chat, args.chat_tokens, args.turns)})
    rows, notes = [], []
    for kind in ("agent", "chat"):
        found = merged(stored.cases["cached"][kind], stored.cases["uncached"][kind])
        later = found[1:]
        rows += [{"session": kind, **row} for row in found]
        reuse = [r["pages reused"] / r["pages reusable"] for r in later if r["pages reusable"]]
        faster = [r["times faster"] for r in later]
        same = sum(row["same answer"] for row in found)
        notes += [
            f"- {kind}: {len(found)} turns; later ones reuse {100 * min(reuse):.1f} % or more of the pages they could.",
            f"- {kind}: a later turn's first token comes {statistics.median(faster):.1f} times sooner (median; least "
            f"{min(faster):.1f}); {same} of {len(found)} answers are the same.",
        ]
    stored.finish("Sessions that grow, with and without prefix caching", rows, notes)


if __name__ == "__main__":
    main()
