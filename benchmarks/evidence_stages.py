"""The stages of evidence.py: each measures one thing on one model and returns plain types."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from laboratory import find
from machine import machine_facts
from report import note, write

from kvbits.calibration.parts import Parts
from kvbits.calibration.run import planner_of
from kvbits.calibration.texts import split_windows
from kvbits.cli.session import Bar, tokens_of
from kvbits.codecs import Policy, PoolLayout
from kvbits.codecs.policy_file import save_policy
from kvbits.config import POLICY_PREFIX
from kvbits.engine.text import encode, encode_chat
from kvbits.evaluation import arithmetic, toolcalls
from kvbits.evaluation.laboratory import Laboratory
from kvbits.evaluation.resume import ResumeCache, key_of
from kvbits.evaluation.selftext import write_windows
from kvbits.evaluation.tasks import TASKS, Material
from kvbits.evaluation.windows import cut_windows, read_text
from kvbits.models import LoadedModel, load_model

TEXT, BOOKS = "wiki.test.raw", ("moby_dick.txt", "war_and_peace.txt")
CONTEXT = 2048
BUDGETS = (4.6, 3.6, 2.6)
UNIFORM = ("int8", "int6", "int4+sink:int8", "int4")
FEW = ("int8", "int4", "4.6", "3.6", "2.6")
"""Dtypes and budgets that the longer stages compare with 16 bit."""

FAR = ("int4", "2.6")
"""Those of prompts beyond 8,192 tokens: the time of each is the prompt's, and what they find shows what others do."""

CACHES = ("q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0")
RULER = ("needle", "multikey", "variables", "common-words")
FIT_WINDOWS, CHECK_WINDOWS = 8, 2
QUESTIONS = 100
WRITTEN = 4096
_ASK = "Write a long, detailed story about a lighthouse keeper who finds a map. Do not stop before the story is told."
_BEGIN = "The lighthouse stood at the end of the long stone pier, and nobody in the village could say who had built it."


@dataclass(frozen=True)
class Subject:
    """A model: file (or a name that kvbits knows), windows of the table of KL, longest context to measure in."""

    file: str
    windows: int
    longest: int
    chat: bool = True


SUBJECTS = {
    "SmolLM2-135M": Subject("smollm2-135m", 8, 8192),
    "Qwen2.5-Coder-0.5B": Subject("qwen2.5-coder-0.5b.gguf", 8, 24576),
    "Gemma 3 270M": Subject("gemma3-270m.gguf", 8, 16384, chat=False),
    "Qwen2.5-Coder-1.5B": Subject("qwen2.5-coder-1.5b.gguf", 4, 24576),
}


@dataclass(frozen=True)
class Run:
    """One model's results, below ``out``; ``models`` and ``data`` are the user's directories."""

    name: str
    subject: Subject
    models: Path
    data: Path
    out: Path
    peers: Path

    def result(self, stage: str) -> Path:
        return self.out / f"{stage}.json"

    def keep(self, stage: str, found: dict[str, Any]) -> None:
        write(self.result(stage), found | {"machine": machine_facts()})

    @property
    def gguf(self) -> str:
        path = self.models / self.subject.file
        return str(path) if path.suffix == ".gguf" else self.subject.file

    @cached_property
    def parts(self) -> ResumeCache:
        self.out.mkdir(parents=True, exist_ok=True)
        return ResumeCache(self.out / "parts.jsonl")

    def load(self, dtype: str) -> LoadedModel:
        return load_model(self.gguf, dtype=dtype, progress=note)

    def policies(self, loaded: LoadedModel, names: Sequence[str]) -> list[Policy]:
        """Dtypes by name, calibrated policies by their bits. Raises ``SystemExit`` where one is not calibrated."""
        found = []
        for name in names:
            path = self.out / "policies" / name
            if name[0].isdigit() and not (path / "policy.json").exists():
                raise SystemExit(f"{self.name} has no policy of {name} bits: run the stage 'calibrate' first")
            policy = loaded.policy(f"{POLICY_PREFIX}{path}" if name[0].isdigit() else name)
            found.append(replace(policy, label=name))
        return found

    def laboratory(self, loaded: LoadedModel, names: Sequence[str], dtype: str) -> Laboratory:
        policies = self.policies(loaded, names)
        return Laboratory(loaded, policies, self.parts, Bar, compute_dtype=dtype, served_dtype=dtype)

    def text(self, loaded: LoadedModel, name: str) -> list[int]:
        return tokens_of(loaded, read_text(find(self.data, name)))


def calibrate(run: Run) -> dict[str, Any]:
    """Policies of every budget from one calibration on books."""
    loaded = run.load("float32")
    texts = [run.text(loaded, name) for name in BOOKS]
    windows, _ = split_windows(texts, CONTEXT, FIT_WINDOWS, CHECK_WINDOWS)
    facts = {"model": loaded.fingerprint, "texts": key_of(texts), "windows": FIT_WINDOWS}
    parts = Parts(run.out / "calibration", facts)
    planner = planner_of(loaded, windows, "int8", Bar, parts)
    rows = []
    for bits in BUDGETS:
        budget = planner.of_bits(bits)
        policy, predicted = planner.policy(budget), planner.predicted(budget)
        kept = {"texts": list(BOOKS), "windows": FIT_WINDOWS, "predicted_kl": predicted}
        save_policy(run.out / "policies" / f"{bits:g}", policy, loaded.geometry, loaded.fingerprint, kept)
        rows.append({"bits": bits, "predicted_kl": predicted})
    parts.remove()
    return {"rows": rows}


def fidelity(run: Run) -> dict[str, Any]:
    """The table of KL: windows of 2,048 tokens, the second half of each scored, float32."""
    loaded = run.load("float32")
    laboratory = run.laboratory(loaded, (*UNIFORM, *(f"{b:g}" for b in BUDGETS)), "float32")
    laboratory.text(cut_windows(run.text(loaded, TEXT), CONTEXT, run.subject.windows))
    return {"rows": _sized(laboratory, loaded)}


def positions(run: Run) -> dict[str, Any]:
    """One window as long as is measured, every position scored, float32."""
    loaded = run.load("float32")
    laboratory = run.laboratory(loaded, FEW, "float32")
    length = min(16384, run.subject.longest)
    laboratory.text(cut_windows(run.text(loaded, TEXT), length, 1), all_positions=True)
    return {"rows": _sized(laboratory, loaded), "context": length}


def written(run: Run) -> dict[str, Any]:
    """KL along a text that the model wrote itself with a 16-bit cache at temperature 1, float32."""
    key = key_of("written", run.subject.file, WRITTEN, _ASK, _BEGIN)
    if key not in run.parts:
        served = run.load("bfloat16")
        chat = run.subject.chat
        begun = encode_chat(served, [{"role": "user", "content": _ASK}]) if chat else encode(served, _BEGIN)
        with Bar(WRITTEN, "writing") as advance:
            text = write_windows(served, WRITTEN, 1, progress=advance, begun=[list(begun)])[0]
        assert served.tokenizer is not None
        run.parts.put(key, {"tokens": text, "text": served.tokenizer.decode(text)})
    loaded = run.load("float32")
    laboratory = run.laboratory(loaded, FEW, "float32")
    laboratory.text([run.parts[key]["tokens"]], all_positions=True)
    return {"rows": laboratory.results(), "text": run.parts[key]["text"]}


def tools(run: Run) -> dict[str, Any]:
    """Calls of functions, as served."""
    loaded = run.load("bfloat16")
    laboratory = run.laboratory(loaded, FEW, "bfloat16")
    cases = toolcalls.read_cases(loaded, find(run.data, toolcalls.FILE), QUESTIONS, run.subject.longest)
    laboratory.tools(cases)
    return {"rows": laboratory.results(), "tokens": len(cases[0].prompt)}


def gsm8k(run: Run) -> dict[str, Any]:
    """School arithmetic, as served."""
    loaded = run.load("bfloat16")
    laboratory = run.laboratory(loaded, FEW, "bfloat16")
    laboratory.arithmetic(arithmetic.read_problems(loaded, find(run.data, arithmetic.FILE), QUESTIONS, CONTEXT))
    return {"rows": laboratory.results()}


def retrieval(length: int, run: Run) -> dict[str, Any]:
    """A needle and RULER's tasks in prompts of ``length`` tokens, as served."""
    loaded = run.load("bfloat16")
    laboratory = run.laboratory(loaded, FEW if length <= 8192 else FAR, "bfloat16")
    material = Material(
        encode=lambda text: encode(loaded, text),
        encode_more=lambda text: loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        text=read_text(find(run.data, BOOKS[0])),
        lengths=(length,),
    )
    for name in RULER:
        laboratory.long_context(name, TASKS[name].make(material))
    return {"rows": laboratory.results(), "length": length}


def llama(context: int, run: Run) -> dict[str, Any]:
    """llama.cpp's quantized caches on the same text and windows; at most ``context`` tokens long."""
    context = min(context, run.subject.longest)
    windows = run.subject.windows if context == CONTEXT else 1
    result = run.out / "llama.tmp.json"
    script = Path(__file__).with_name("quality_peers.py")
    line = [sys.executable, str(script), "--text", str(find(run.data, TEXT)), "--json", str(result)]
    line += ["--context", str(context), "--windows", str(windows), "--caches", *CACHES]
    line += ["--directory", str(run.peers), *(["--gguf", run.gguf] if run.gguf.endswith(".gguf") else [])]
    subprocess.run(line, check=True)
    found = json.loads(result.read_text())
    for path in (result, result.with_suffix(".md")):
        path.unlink()
    return {"rows": found["rows"], "context": context, "windows": windows}


def _sized(laboratory: Laboratory, loaded: LoadedModel) -> list[dict[str, Any]]:
    """Results with the bits of all that a sequence of 2,048 and of 8,192 tokens holds."""
    layouts = [PoolLayout.of(loaded.geometry, policy) for policy in laboratory.policies]
    return [
        row | {f"bits_{tokens}": layout.effective_bits(tokens) for tokens in (2048, 8192)}
        for row, layout in zip(laboratory.results(), layouts, strict=True)
    ]


@dataclass(frozen=True)
class Stage:
    """``measure`` returns ``rows`` and what else is worth keeping, from the files ``needs`` of the data; the rest says
    which models it fits."""

    measure: Callable[[Run], dict[str, Any]]
    needs: tuple[str, ...] = ()
    chat: bool = False
    largest: bool | None = None
    length: int = 0

    def fits(self, subject: Subject) -> bool:
        size = self.largest is None or self.largest is (subject is SUBJECTS["Qwen2.5-Coder-1.5B"])
        return size and subject.chat >= self.chat and subject.longest >= self.length

    def check(self, run: Run) -> None:
        """Raise ``SystemExit`` where the model or a file is missing."""
        if run.gguf.endswith(".gguf") and not Path(run.gguf).exists():
            raise SystemExit(f"there is no {run.subject.file} in {run.models}")
        for name in self.needs:
            find(run.data, name)


STAGES = {
    "calibrate": Stage(calibrate, BOOKS),
    "fidelity": Stage(fidelity, (TEXT,)),
    "gsm8k": Stage(gsm8k, (arithmetic.FILE,), largest=True),
    "tools": Stage(tools, (toolcalls.FILE,), chat=True),
    "llama": Stage(partial(llama, CONTEXT), (TEXT,)),
    "written": Stage(written),
    "positions": Stage(positions, (TEXT,)),
    **{f"retrieval-{n // 1024}k": Stage(partial(retrieval, n), BOOKS[:1], length=n) for n in (8192, 16384, 24576)},
    "llama-long": Stage(partial(llama, 16384), (TEXT,), largest=False),
}
"""In the order in which they run. The only model that can do school arithmetic is the largest."""
