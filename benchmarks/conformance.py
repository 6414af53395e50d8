"""Every response and every stream chunk of a run over real conversations against OpenAI's published JSON Schema.

    python benchmarks/conformance.py --schema schema.json --url http://127.0.0.1:8000 REQUESTS...

REQUESTS are OpenAI request bodies (.json), conversations in ShareGPT form (.json), MT-Bench questions (.jsonl) or
BFCL function-calling questions (.json, one object a line). Each is sent as a whole answer and as a stream; histories
are cut to what the server's context holds. Prints one line a file and exits with 1 when anything was invalid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator

Body = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant"}


class Schemas:
    """The definitions of one schema file."""

    def __init__(self, path: Path) -> None:
        self._root = json.loads(path.read_text("utf-8"))
        self._validators: dict[str, Draft202012Validator] = {}

    def errors(self, name: str, value: object) -> list[str]:
        """What is wrong with ``value`` as a ``name``."""
        if name not in self._validators:
            schema = {"$ref": f"#/$defs/{name}", "$defs": self._root["$defs"]}
            self._validators[name] = Draft202012Validator(schema)
        return [
            f"{name}{error.json_path[1:]}: {error.message[:200]}" for error in self._validators[name].iter_errors(value)
        ]


def bodies_of(path: Path) -> Iterator[Body]:
    """The chat requests that a file holds."""
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl" or "\n{" in text:
        for line in text.splitlines():
            yield from _row(json.loads(line))
        return
    found = json.loads(text)
    for row in found if isinstance(found, list) else [found]:
        yield from _row(row)


def _row(row: Body) -> Iterator[Body]:
    if "messages" in row:
        yield {key: row[key] for key in ("messages", "tools", "tool_choice") if row.get(key)}
    elif "turns" in row:
        yield {"messages": [{"role": "user", "content": row["turns"][0]}]}
    elif "conversations" in row:
        talk = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        yield {"messages": talk[:-1] if talk[-1]["role"] == "assistant" and len(talk) > 1 else talk}
    elif "function" in row:
        tools = [{"type": "function", "function": _function(f)} for f in row["function"]]
        yield {"messages": row["question"][0], "tools": tools, "tool_choice": "required"}
    else:
        raise SystemExit(f"a row with the fields {sorted(row)} is no request")


def _function(function: Body) -> Body:
    """A BFCL function with JSON Schema's names of types, and a name that OpenAI allows."""
    text = json.dumps(function["parameters"])
    for name, proper in (("dict", "object"), ("float", "number"), ("tuple", "array"), ("any", "string")):
        text = text.replace(f'"type": "{name}"', f'"type": "{proper}"')
    return {"name": function["name"], "description": function["description"], "parameters": json.loads(text)}


class Run:
    """Requests to one server and what was wrong with its answers."""

    def __init__(self, url: str, schemas: Schemas, new_tokens: int) -> None:
        self._http = httpx.Client(base_url=url, timeout=600)
        self._schemas = schemas
        self._new_tokens = new_tokens
        models = self._http.get("/v1/models").json()
        self.problems: list[str] = []
        self.checked: Counter[str] = Counter()
        self._check("ListModelsResponse", models)
        self._model = models["data"][0]["id"]
        self._context = models["data"][0]["max_model_len"]

    def send(self, body: Body, number: int) -> None:
        """Ask for a whole answer and for a stream, with options that change from request to request."""
        body = self._fit(
            {**body, "model": self._model, "max_tokens": self._new_tokens, "temperature": 0.7, "seed": number}
        )
        if number % 3 == 0:
            body |= {"logprobs": True, "top_logprobs": 3}
        if number % 4 == 1:
            body |= {"n": 2}
        self._check("CreateChatCompletionRequest", body)
        answer = self._http.post("/v1/chat/completions", json=body)
        self._check("CreateChatCompletionResponse" if answer.status_code == 200 else "ErrorResponse", answer.json())
        self.checked[f"status {answer.status_code}"] += 1
        if answer.status_code == 200:
            self.checked.update(f"finish {choice['finish_reason']}" for choice in answer.json()["choices"])
        if answer.status_code >= 500:
            self.problems.append(answer.text[:300])
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with self._http.stream("POST", "/v1/chat/completions", json=body | options) as stream:
            lines = [line for line in stream.iter_lines() if line]
        if stream.status_code != 200:
            self._check("ErrorResponse", json.loads("".join(lines)))
            return
        if lines[-1] != "data: [DONE]":
            self.problems.append(f"a stream ended with {lines[-1][:200]}")
        for line in lines[:-1]:
            self._check("CreateChatCompletionStreamResponse", json.loads(line.removeprefix("data: ")))

    def complete(self, text: str) -> None:
        """Text completions. Echo and log-probabilities apart: together, the first token has none, which is ``null``.

        So OpenAI answers too, but its schema wants a number there.
        """
        for options in ({"echo": True}, {"logprobs": 2}):
            body = {"model": self._model, "prompt": text[:2000], "max_tokens": self._new_tokens, **options}
            self._check("CreateCompletionRequest", body)
            self._check("CreateCompletionResponse", self._http.post("/v1/completions", json=body).json())

    def refuse(self) -> None:
        """Requests that must fail, in the shape of an error."""
        for path, body in (
            ("/v1/chat/completions", {"model": self._model, "messages": []}),
            ("/v1/chat/completions", {"model": "nothing", "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/chat/completions", {"model": self._model, "messages": [{"role": "user", "content": "x"}], "odd": 1}),
            ("/v1/completions", {"model": self._model}),
            ("/v1/nothing", {}),
        ):
            answer = self._http.post(path, json=body)
            if answer.status_code < 400:
                self.problems.append(f"{path} took {body}")
            self._check("ErrorResponse", answer.json())

    def _fit(self, body: Body) -> Body:
        """Drop tools, then the newest messages, until the prompt and the answer fit the context."""
        while self._tokens(body) + self._new_tokens > self._context:
            if body.pop("tools", None) is not None:
                body.pop("tool_choice", None)
                self.checked["requests that lost their tools to the context"] += 1
            elif len(body["messages"]) > 1:
                body = {**body, "messages": body["messages"][: max(1, len(body["messages"]) * 3 // 4)]}
            else:
                cut = str(body["messages"][0]["content"])[: self._context]
                body = {**body, "messages": [{**body["messages"][0], "content": cut}]}
        return body

    def _tokens(self, body: Body) -> int:
        asked = {"messages": body["messages"], "tools": body.get("tools")}
        answer = self._http.post("/tokenize", json=asked)
        if answer.status_code != 200:
            return 0
        return int(answer.json()["count"])

    def _check(self, name: str, value: object) -> None:
        self.checked[name] += 1
        self.problems += self._schemas.errors(name, value)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schema", type=Path, required=True, help="JSON Schema with OpenAI's objects in $defs")
    parser.add_argument("--url", required=True, help="server to check, without /v1")
    parser.add_argument("--limit", type=int, default=5, metavar="N", help="requests of each file (default 5)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="max_tokens of each (default 32)")
    parser.add_argument("requests", type=Path, nargs="+", help="files with requests or conversations")
    options = parser.parse_args()
    run = Run(options.url, Schemas(options.schema), options.new_tokens)
    number = 0
    for path in options.requests:
        before = len(run.problems)
        for body, _ in zip(bodies_of(path), range(options.limit), strict=False):
            run.send(body, number)
            if number % 5 == 0:
                run.complete(str(body["messages"][-1].get("content") or "text"))
            number += 1
        print(f"{path.name}: {len(run.problems) - before} problems", flush=True)
    run.refuse()
    for name, count in sorted(run.checked.items()):
        print(f"{count:7,} {name}")
    for problem, count in Counter(run.problems).most_common(20):
        print(f"INVALID ({count}): {problem}")
    sys.exit(1 if run.problems else 0)


if __name__ == "__main__":
    main()
