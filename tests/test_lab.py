"""The laboratory on a tiny model: forced answers, layers, free text, tool calls, a planted fault, and the commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import status
from helpers.tiny import VOCAB, chat_tokenizer, save, tiny_model

from kvbits.attention import Forward
from kvbits.codecs import Policy
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.compare import REFERENCE
from kvbits.evaluation.drive import drive
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.generation import write
from kvbits.evaluation.laboratory import FAULT, Laboratory, plant_fault
from kvbits.evaluation.layers import layer_errors, measure_layers
from kvbits.evaluation.parts import NAMES
from kvbits.evaluation.probes import Probe, ask
from kvbits.evaluation.resume import ResumeCache
from kvbits.models import LoadedModel, load_model

CONTEXT = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = tiny_model("llama", max_position_embeddings=CONTEXT)
    return save(tiny, tmp_path_factory.mktemp("model"), chat_tokenizer)


@pytest.fixture(scope="module")
def loaded(model: str) -> LoadedModel:
    return load_model(model, dtype="float32")


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(4, VOCAB, (2000,), generator=generator).tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, bAbI stories and tool questions of the tiny model's words."""
    folder = tmp_path_factory.mktemp("data")
    paragraphs = [" ".join(f"w{4 + (i * i + 7 * i + j) % (VOCAB - 4)}" for j in range(12)) for i in range(150)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    for kind in ("qa1", "qa2"):
        (folder / f"{kind}_facts_test.txt").write_text("1 w5 w6.\n2 w7 w8.\n3 Where is w5? \tw6\t1\n")
    question = {"id": "q0", "question": [[{"role": "user", "content": "w5 w6"}]]}
    question["function"] = [{"name": "w9", "parameters": {}}]
    (folder / "BFCL_simple.json").write_text(json.dumps(question) + "\n")
    (folder / "possible_answer").mkdir()
    (folder / "gsm8k_test.jsonl").write_text('{"question": "w5 w6", "answer": "#### 7"}\n')
    answer = {"id": "q0", "ground_truth": [{"w9": {"w5": [1]}}]}
    (folder / "possible_answer" / "BFCL_simple.json").write_text(json.dumps(answer) + "\n")
    return folder


class Bars:
    """A bar that counts."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def __call__(self, total: int, label: str) -> Bars:
        self.label = label
        self.totals[label], self.done[label] = total, 0
        return self

    def __enter__(self) -> Any:
        return self._advance

    def _advance(self, tokens: int) -> None:
        self.done[self.label] += tokens

    def __exit__(self, *exception: object) -> None:
        pass


def engine_of(loaded: LoadedModel, dtype: str) -> Engine:
    return Engine(loaded, EngineConfig(dtype, 1 << 23))


def policies(loaded: LoadedModel, *dtypes: str) -> list[Policy]:
    return [loaded.policy(dtype) for dtype in dtypes]


# Answers


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_forced_answers_are_scored_as_given_tokens_are(model: str, tokens: list[int], dtype: str) -> None:
    """Against the same tokens teacher-forced: another way through engine and kernels, without a prefix cache.

    In bfloat16, whose layers do not depend on the rows beside: in float32 a last bit may move a query's code.
    """
    loaded = load_model(model, dtype="bfloat16")
    prompt = tokens[:300]
    golds = [tokens[400:405], tokens[500:503]]
    probes = [Probe("x", "one", (*prompt, t), tuple(g), {}) for t, g in zip((9, 8), golds, strict=True)]
    found = ask(loaded, loaded.policy(dtype), probes, ResumeCache())
    for probe, answer in zip(probes, found, strict=True):
        whole = [*probe.prompt, *probe.gold]
        rows = torch.cat([logits for _, logits in engine_of(loaded, dtype).teacher_forced(whole, 300)])
        logprobs = torch.log_softmax(rows[:-1].double(), -1)
        expected = logprobs.gather(1, torch.tensor(probe.gold).unsqueeze(1)).sum().item()
        assert answer.logprob == pytest.approx(expected, abs=1e-5)
        assert answer.exact == (logprobs.argmax(-1).tolist() == list(probe.gold))


def test_an_answer_is_exact_where_greedy_decoding_gives_it(loaded: LoadedModel, tokens: list[int]) -> None:
    prompt = tokens[:200]
    greedy: list[int] = []
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    for step in drive(engine_of(loaded, "int8"), [prompt], params):
        greedy += [t for delta in step.deltas for t in delta.token_ids]
    wrong = [*greedy[:5], (greedy[5] + 1) % VOCAB]
    probes = [Probe("x", "one", tuple(prompt), tuple(gold), {}) for gold in (greedy, wrong)]
    assert [a.exact for a in ask(loaded, loaded.policy("int8"), probes, ResumeCache())] == [True, False]


def test_documents_that_are_done_are_not_asked_again(
    loaded: LoadedModel, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "parts.jsonl"
    probes = [Probe("x", str(i), tuple(tokens[i : i + 150]), (5, 6), {"length": 150}) for i in range(3)]
    first = ask(loaded, loaded.policy("int4"), probes[:2], ResumeCache(path))
    steps = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: steps.append(1) or step(self))
    assert ask(loaded, loaded.policy("int4"), probes[:2], ResumeCache(path)) == first
    assert not steps
    assert ask(loaded, loaded.policy("int4"), probes, ResumeCache(path))[:2] == first
    assert steps
    assert ask(loaded, loaded.policy("int2"), probes[:2], ResumeCache(path)) != first


# Layers


def test_layers_by_themselves_agree_with_plain_attention(loaded: LoadedModel, tokens: list[int]) -> None:
    """Error feedback through the layers is shut out: layer 2 of a run whose layers 0 and 1 are 16 bit sees the same."""
    window = tokens[:320]
    found = measure_layers(loaded, policies(loaded, "int4", "0-1:bf16,2:int4", REFERENCE), window)
    errors = {dtype: layer_errors([sums.as_json()]) for dtype, sums in found.items() if dtype != REFERENCE}
    whole, last = errors["int4"], errors["0-1:bf16,2:int4"]
    assert [e.error for e in last[:2]] == [0.0, 0.0]
    assert last[2] == whole[2]
    assert 0.001 < whole[2].error < 0.5
    coarse = layer_errors([measure_layers(loaded, policies(loaded, "int2"), window)["int2"].as_json()])
    assert all(c.error > 2 * e.error for c, e in zip(coarse, whole, strict=True))
    assert all(abs(e.key_off) < 0.02 and abs(e.value_off) < 0.02 for e in whole)


def test_the_chunk_does_not_change_what_layers_say(loaded: LoadedModel, tokens: list[int]) -> None:
    found = [layer_errors([measure_layers(loaded, policies(loaded, "int4"), tokens[:300], chunk)["int4"].as_json()])
             for chunk in (64, 192)]  # fmt: skip
    for one, two in zip(*found, strict=True):
        assert one.error == pytest.approx(two.error, rel=1e-3)
        assert one.key_off == pytest.approx(two.key_off, rel=1e-6)


def test_the_measured_layers_leave_the_logits_alone(loaded: LoadedModel, tokens: list[int]) -> None:
    """What the listening kernels return is the 16-bit cache's output."""
    seen = []
    forward = LoadedModel.forward

    def listen(self: LoadedModel, ids: Any, positions: Any, step: Forward, rows: Any) -> torch.Tensor:
        seen.append(forward(self, ids, positions, step, rows))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "forward", listen)
        measure_layers(loaded, policies(loaded, "int2"), tokens[:192], 64)
    rows = torch.cat([logits for _, logits in engine_of(loaded, "bf16").teacher_forced(tokens[:192], 0)])
    torch.testing.assert_close(torch.cat(seen), rows[63::64], atol=1e-4, rtol=1e-4)


# Text


def test_positions_split_the_records_of_all_windows() -> None:
    fidelity = Fidelity()
    for shift in (0.0, 0.5):
        logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(1))
        other = logits + torch.cat([torch.zeros(20, 9), shift * torch.eye(9)[torch.zeros(20, dtype=torch.long)]])
        fidelity.add(logits, other, torch.zeros(40, dtype=torch.long), first_position=10)
    first, second = fidelity.by_position([10, 30, 50, 90])
    assert (first.begin, first.end, first.tokens, first.kl_mean) == (10, 30, 40, 0.0)
    assert (second.begin, second.end, second.tokens) == (30, 50, 40)
    assert second.kl_mean > 0
    assert fidelity.since(30).summary().kl_mean == pytest.approx(second.kl_mean)
    again = Fidelity.from_json(json.loads(json.dumps(fidelity.as_json())))
    assert again.summary() == fidelity.summary()


def test_free_text_is_scored_by_the_16_bit_cache(loaded: LoadedModel, tokens: list[int]) -> None:
    prompts = [tokens[:100], tokens[300:400]]
    reference = write(loaded, loaded.policy(REFERENCE), prompts, 40, ResumeCache())
    other = write(loaded, loaded.policy("int2"), prompts, 40, ResumeCache())
    assert [(t.prompt, t.mode) for t in other] == [(0, "greedy"), (0, "drawn"), (1, "greedy"), (1, "drawn")]
    assert {len(t.tokens) for t in other} == {40}
    for text in (reference[0], other[1]):
        whole = [*prompts[text.prompt], *text.tokens]
        rows = torch.cat([logits for _, logits in engine_of(loaded, "bf16").teacher_forced(whole, 99)])
        expected = torch.nn.functional.cross_entropy(rows[:-1].double(), torch.tensor(text.tokens)).item()
        assert text.nll == pytest.approx(expected, abs=1e-6)
    facts = other[0].facts(reference[0])
    assert 0 <= facts["same_tokens"] < 40
    assert other[0].tokens[: facts["same_tokens"]] == reference[0].tokens[: facts["same_tokens"]]
    assert reference[0].facts(reference[0])["same_tokens"] == 40


def test_a_dtype_that_is_named_twice_runs_once(model: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    twice = ("--kv-cache-dtype", "int4", "--kv-cache-dtype", "int4")
    ask = ("evaluate", model, "--text", data / "text.txt", "--window", 192, "--windows", 1, "--json", out)
    assert status(*ask, *twice) == 0
    assert [row["dtype"] for row in json.loads(out.read_text())["results"]] == ["int4"]


# The planted fault


def test_a_scale_that_is_off_by_5_percent_is_noticed(loaded: LoadedModel, tokens: list[int]) -> None:
    laboratory = Laboratory(loaded, policies(loaded, "bf16", "int8", "int4"), ResumeCache(), Bars())
    windows = [tokens[:448], tokens[448:896]]
    laboratory.text(windows)
    laboratory.layers(windows)
    healthy = {row["dtype"]: row for row in laboratory.results()}
    faulty = {row["dtype"]: row for row in plant_fault(laboratory, windows)}
    assert set(faulty) == {"int8" + FAULT, "int4" + FAULT}
    assert healthy["bf16"]["verdict"] == "no measurable loss"
    for dtype in ("int8", "int4"):
        kinds = {m["where"]: m["verdict"] for m in healthy[dtype]["measures"] if m["kind"] == "gain"}
        assert kinds == {"keys": "no measurable loss", "values": "no measurable loss"}
        row = faulty[dtype + FAULT]
        assert row["verdict"] == "do not use"
        assert any("read back is too large or too small by 5 %" in reason for reason in row["reasons"])
        assert row["noticed"]
        assert row["kl_mean"] > 1.5 * healthy[dtype]["kl_mean"]
    assert healthy["int8"]["verdict"] != "do not use"


# Commands


SIZES = (
    "--context", 256, "--windows", 2, "--task-context", 400, "--depths", 2, "--texts", 2, "--new-tokens", 30,
)  # fmt: skip


def test_every_task_in_one_run_and_again_from_its_parts(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page, parts = tmp_path / "lab.json", tmp_path / "lab.html", tmp_path / "parts.jsonl"
    names = ",".join(name for name in NAMES if name != "common-words")  # needs more than this model's context
    command = (
        "evaluate", model, "--text", data / "text.txt", "--tasks", names, "--data-dir", data, *SIZES,
        "--kv-cache-dtype", "int8", "--kv-cache-dtype", "int2", "--resume", parts, "--json", out, "--html", page,
    )  # fmt: skip
    assert status(*command) == 0
    shown = capsys.readouterr().out
    document = json.loads(out.read_text())
    eight, two = document["results"]
    tasks = ["passkey", "needle", "kv-retrieval", "lines", "multikey", "variables", "babi"]
    assert list(eight["tasks"]) == tasks
    assert eight["tools"]["questions"] == eight["gsm8k"]["questions"] == 1
    assert eight["verdict"] in shown
    assert two["by_layer"]["error_mean"] > eight["by_layer"]["error_mean"]
    assert [p["begin"] for p in eight["by_position"]][:2] == [128, 144]
    assert len(two["tasks"]["passkey"]["cells"]) == 2 * 3
    assert two["generation"]["drawn"]["texts"] == 2
    html = page.read_text()
    for word in (*tasks, "int8", "int2", "GSM8K", "The rule", eight["verdict"]):
        assert word in html
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,', html)) == 7
    assert not re.findall(r'(?:src|href)="(?!data:)', html)

    lines = parts.read_text()
    monkeypatch.setattr(Engine, "step", lambda self: pytest.fail("a part ran again"))
    monkeypatch.setattr(Engine, "teacher_forced", lambda *_: pytest.fail("a part ran again"))
    assert status(*command) == 0
    assert parts.read_text() == lines
    assert json.loads(out.read_text()) == document


def test_the_self_check_notices_its_fault(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lab.json"
    common = ("evaluate", model, "--text", data / "text.txt", *SIZES, "--kv-cache-dtype", "int4", "--self-check")
    assert status(*common, "--json", out) == 0
    assert "int4 with scales off by 5 %: do not use; noticed" in capsys.readouterr().err
    assert json.loads(out.read_text())["results"][1]["noticed"] is True
    assert status(*common, "--tasks", "lines") == 2
    assert "--self-check needs the task fidelity" in capsys.readouterr().err


def test_advice_fits_the_sessions_asked_for(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, parts = tmp_path / "advice.json", tmp_path / "parts.jsonl"
    common = (
        "advise", model, "--text", data / "text.txt", "--context", 400, "--window", 256, "--windows", 1, "--json", out,
        "--resume", parts, "--speed-context", 64, "--speed-batch", 2, "--new-tokens", 3,
        "--kv-cache-dtype", "int8", "--kv-cache-dtype", "int2",
    )  # fmt: skip
    assert status(*common, "--memory", "1MiB", "--sessions", 2) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    rows = {row["dtype"]: row for row in found["candidates"]}
    # 16 bit by hand: 7 pages of 3 layers x 2 x 2 heads x 16 elements x 64 tokens x 2 bytes
    assert rows["bf16"]["sessions"] == (1 << 20) // (7 * 3 * 2 * 2 * 16 * 64 * 2)
    assert list(rows) == ["bf16", "int8", "int2"]
    assert rows["bf16"]["kl_mean"] == 0.0
    assert found["advice"] in shown.replace("\n", " ") or found["advice"][:20] in shown
    assert "Use --kv-cache-dtype" in found["advice"]
    assert status(*common, "--memory", "1MiB", "--sessions", 500) == 0
    advice = json.loads(out.read_text())["advice"]
    assert advice.startswith("Nothing that is fit to use holds 500 sessions of 400 tokens in 1048576 bytes.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tasks", "nedle"), "unknown task 'nedle'"),
        (("--tasks", "babi"), "the task 'babi' needs a file"),
        (("--tasks", "babi", "--data-dir", "/no/such/dir"), "does not exist"),
        ((), "needs a text"),
        (("--tasks", "lines", "--samples", "0"), "'--samples'"),
        (("--tasks", "lines", "--task-context", "9999"), "the task context is 9999 tokens"),
        (("--tasks", "lines", "--resume", "/no/such/dir/x"), "cannot use the file"),
        (("--tasks", "lines", "--html", "/no/such/dir/x"), "cannot write to"),
        (("--tasks", "lines", "--haystack", "/no/such/file"), "cannot read the text file"),
    ],
)
def test_mistakes_in_one_line(
    model: str, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert status("evaluate", model, "--kv-cache-dtype", "int8", *options) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line.startswith("kvbits: error: ") for line in error] == [False] * (len(error) - 1) + [True]
    assert words in error[-1]
