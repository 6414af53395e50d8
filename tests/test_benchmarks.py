"""The benchmarks run: each script on a tiny model and tiny sizes, in this process, down to the results it writes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import typer
from helpers.serving import CONTEXT, byte_model, byte_tokenizer, engine_of, running
from helpers.tiny import save, tiny_model

from kvbits.cli.main import app
from kvbits.codecs import PoolLayout
from kvbits.engine import answer
from kvbits.evaluation.documents import reference_text
from kvbits.models import load_model
from kvbits.replay.target import find_target

ROOT = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8"))
ELSEWHERE = {
    "compare_engines": "has a file of its own, test_compare_engines.py",
    "evidence": "has a file of its own, test_evidence.py",
    "cuda_cycles": "needs NVRTC and NVIDIA's disassembler",
    "llama_server": "needs llama-server, which peers/install.py builds",
    "ray_faults": "needs a Ray cluster",
    "ray_routing": "needs a Ray cluster",
    "ray_transfer": "needs a Ray cluster",
    "triton_attention": "needs a GPU",
}
"""Scripts that need what a test cannot have. Their types are checked."""


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        whole = reference_text()
        patch.setattr(importlib.import_module("filled"), "reference_text", lambda: whole[:20_000])
        yield
    sys.path.remove(str(ROOT))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = tiny_model("llama", head_dim=64, vocab_size=259, max_position_embeddings=CONTEXT)
    return save(tiny, tmp_path_factory.mktemp("model"), byte_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(f"Sentence {i} says that {i * i} is the square of {i}." for i in range(400)))
    return path


Run = Callable[..., ModuleType]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script's ``main`` with arguments."""

    def run(name: str, *arguments: object) -> ModuleType:
        assert name in SCRIPTS
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        assert not module.main()
        return module

    return run


def results(path: Path, *tables: str) -> dict[str, Any]:
    """What a script wrote; every table has rows, and the text beside it names their columns."""
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert document["machine"]["logical_cpus"] >= 1
    said = path.with_suffix(".md").read_text("utf-8")
    for name in tables or ("rows",):
        assert document[name]
        assert all(column in said for column in document[name][0])
    return document


def test_every_script_is_run_here_or_named() -> None:
    source = Path(__file__).read_text("utf-8")
    missing = [name for name in SCRIPTS if name not in ELSEWHERE and f'"{name}"' not in source]
    assert not missing
    assert set(ELSEWHERE) <= set(SCRIPTS)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere(name: str) -> None:
    pytest.skip(f"benchmarks/{name}.py {ELSEWHERE[name]}")


# Without a model


def test_linears(run: Run, tmp_path: Path) -> None:
    sizes = ("--out-features", 64, "--in-features", 256, "--rows", 1, 20, "--mib", 4, "--repeats", 1, "--threads", 1)
    run("linears", *sizes, "--format", "q4_k", "bf16", "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["format"], row["rows"]) for row in found] == [(f, n) for f in ("q4_k", "bf16") for n in (1, 20)]
    assert all(row["read_share"] > 0 for row in found)


def test_bandwidth(run: Run, tmp_path: Path) -> None:
    run("bandwidth", "--mib", 4, "--repeats", 1, "--threads", 1, "--json", tmp_path / "r.json")
    found = results(tmp_path / "r.json")
    assert found["settings"]["read_bandwidth_gb_per_s"] == max(row["gb_per_s"] for row in found["rows"])


def test_attention(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("attention")
    monkeypatch.setattr(module, "read_bandwidth", lambda: 1e9)
    small = ("--context", 128, "--batch", 1, "--repeats", 1, "--max-bytes", 1 << 18)
    run("attention", *small, "--phase", "decode", "--json", tmp_path / "r.json")
    assert {row["dtype"] for row in results(tmp_path / "r.json")["rows"]} == {"bf16", "int8", "int4"}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_unequal(run: Run, tmp_path: Path) -> None:
    small = ("--long", 256, "--short", 2, "--short-context", 128, "--repeats", 1, "--max-bytes", 1 << 18)
    run("unequal", *small, "--threads", 1, "--json", tmp_path / "r.json")
    assert {row["case"] for row in results(tmp_path / "r.json")["rows"]} == {"unequal", "equal", "alone"}


def test_triton_compile(run: Run, tmp_path: Path) -> None:
    small = ("--dtype", "int4", "--heads", 2, 1, "--head-dim", 32, 32, "--kernels", "append")
    run("triton_compile", *small, "--target", "gfx942", "--json", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["append_rows"]
    assert all(row["registers"] > 0 for row in rows)


def test_gpu_engine(run: Run, tmp_path: Path) -> None:
    small = ("--shape", "tiny", "--batch", 2, "--context", 200, "--tokens", 8, "--kv-cache-memory", "8MiB")
    run("gpu_engine", *small, "--device", "cpu", "--dtype", "bf16", "int4", "--json", tmp_path / "r.json")
    own, sixteen, four = json.loads((tmp_path / "r.json").read_text())["results"]
    assert own["dtype"] == "transformers"
    assert sixteen["logits_off"] < 0.02 < four["logits_off"] < 0.2
    assert sixteen["bytes"] > four["bytes"]


def test_step_host(run: Run, tmp_path: Path) -> None:
    run("step_host", "--layers", 2, "--batch", 3, "--context", 128, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["kernels"] for row in found] == ["cuda", "cuda", "triton", "triton"]
    assert all(row["attention"] > 0 and row["replayed"] > 0 for row in found)


def test_step_gap(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "sample", answer.sample)  # the script's own is gone when the test ends
    run("step_gap", "--batch", 2, "--context", 128, "--steps", 4, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert 0 < found["gap"]["least"] < found["step"]["median"]


# The engine


def test_end_to_end(run: Run, model: str, tmp_path: Path) -> None:
    small = ("--batch", 1, 2, "--context", 128, "--rounds", 1, "--steps", 2, "--dtype", "bf16", "int4")
    run("end_to_end", "--model", model, *small, "--json", tmp_path / "r.json")
    assert len(results(tmp_path / "r.json")["rows"]) == 4


def test_step_breakdown(run: Run, model: str, tmp_path: Path) -> None:
    small = ("--batch", 2, "--context", 192, "--prompt", 128, "--chunk", 64, "--repeats", 1, "--steps", 2)
    run("step_breakdown", "--model", model, *small, "--evict-mib", 1, "--dtype", "int4", "--json", tmp_path / "r.json")
    rows = results(tmp_path / "r.json")["rows"]
    for phase in ("decode", "prefill"):
        own = {row["part"]: row["ms"] for row in rows if row["phase"] == phase}
        assert sum(v for k, v in own.items() if k != "total") == pytest.approx(own["total"], rel=1e-6)
        assert own["attention"] + own["append, seal, settle"] > 0


def test_cost_growth(run: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("cost_growth")
    monkeypatch.setattr(module, "read_bandwidth", lambda: 1e9)
    small = ("--batch", 2, "--context", 64, 128, 192, "--steps", 2, "--session", 128, "--sessions", 1, 3)
    run("cost_growth", "--model", model, *small, "--dtype", "int8", "--json", tmp_path / "r.json")
    held = results(tmp_path / "r.json", "rows", "straight_lines", "memory")["memory"]
    loaded = load_model(model)
    each = PoolLayout.of(loaded.geometry, loaded.policy("int8")).session_bytes(128) / 2**20
    assert [row["pool_MiB"] for row in held] == pytest.approx([each, 3 * each])


def test_mixed_load(run: Run, model: str, tmp_path: Path) -> None:
    small = ("--decoding", 2, "--context", 128, "--prompt-tokens", 200, "--prefills", 1, "--rounds", 1)
    more = ("--max-num-batched-tokens", 128, "--alone-steps", 2, "--dtype", "int4", "--json", tmp_path / "r.json")
    run("mixed_load", "--model", model, *small, *more)
    assert [row["budget"] for row in results(tmp_path / "r.json")["rows"]] == ["no prompts", 128]


def test_weight_quality(run: Run, model: str, text: Path, tmp_path: Path) -> None:
    out, forms = tmp_path / "r.json", ("auto", "int8", "int4")
    run("weight_quality", model, "--weights", *forms, "--text", text, "--window", 64, "--windows", 2, "--json", out)
    plain, eight, four = results(out)["rows"]
    assert 0 <= plain["kl"] < eight["kl"] < four["kl"], "the tiny model's own weights are in 16 bits"
    assert plain["tokens"] == 2 * 31


def test_busy_machine(run: Run, model: str, tmp_path: Path) -> None:
    small = ("--others", 0, 1, "--context", 128, "--rounds", 1, "--steps", 2, "--kv-cache-dtype", "int4")
    run("busy_machine", "--model", model, *small, "--json", tmp_path / "r.json")
    rows = results(tmp_path / "r.json")["rows"]
    assert [row["others"] for row in rows] == [0, 1]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_plan_check(run: Run, model: str, tmp_path: Path) -> None:
    run("plan_check", model, "--context", 150, "--memory", "1MiB", "--dtype", "int4", "--json", tmp_path / "r.json")
    (row,) = results(tmp_path / "r.json")["rows"]
    assert row["admitted"] == row["admitted_planned"] > 1
    assert row["frames_held"] == row["frames_planned"]


def test_speculation(run: Run, model: str, text: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    talk = [{"role": role, "content": "say it again"} for role in ("user", "assistant", "user", "assistant")]
    chat.write_text(json.dumps({"messages": talk}))
    small = ("--context", 300, "--new-tokens", 12, "--runs", 1, "--turns", 1, "--kv-cache-memory", "4MiB")
    run("speculation", model, text, chat, *small, "--json", tmp_path / "r.json")
    assert [row["text"] for row in results(tmp_path / "r.json")["rows"]] == ["book.txt", "chat.json"]


def test_hf_cache(run: Run, model: str, text: Path, tmp_path: Path) -> None:
    caches = ("--cache", "transformers DynamicCache", "kvbits int8", "--drafted", 8)
    run(
        "hf_cache",
        "--model",
        model,
        "--text",
        text,
        "--context",
        320,
        "--steps",
        3,
        *caches,
        "--json",
        tmp_path / "r.json",
    )
    plain, ours = results(tmp_path / "r.json")["rows"]
    assert plain["kl"] == 0 < ours["kl"] < 0.1
    assert ours["sliding_windows"] == "yes"


# Quality


def test_quality_table(run: Run, model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"{i} times {i} is {i * i}," for i in range(300)))
    small = ("--windows", 2, "--fit-windows", 2, "--context", 256, "--bits", 6.5, "--gain", 4.5, "--no-llama")
    asked = (model, "--calibrate", text, "--text", f"other={other}", *small, "-o", tmp_path / "out")
    module = run("quality_table", *asked)
    found = results(tmp_path / "out" / "quality.json", "gain")
    names = [row["policy"] for row in found["rows"]]
    assert sorted(names) == ["calibrated-6.5", "gain-4.5-allocated", "gain-4.5-plain", "gain-4.5-uniform"]
    kl = {row["policy"]: row["kl_mean"] for row in found["rows"]}
    assert 0 < kl["calibrated-6.5"] < kl["gain-4.5-plain"]
    # What is done is not done again.
    monkeypatch.setattr(module, "planner_of", lambda *_: pytest.fail("calibrated again"))
    run("quality_table", *asked)
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["rows"] == found["rows"]


def test_quality_peers(run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("quality_peers")
    said = (
        "Final estimate: PPL = 20.0 +/- 0.1\nMean PPL(Q) : 20.5 +/- 0.1\nMean    KLD: 0.01 +/- 0.001\n"
        "99.0%   KLD: 0.2\nMaximum KLD: 3.5\nSame top p: 95.5 +/- 0.1 %\n"
    )
    monkeypatch.setattr(module, "run", lambda line: said)
    monkeypatch.setattr(module, "f16_weights", lambda place, gguf: gguf)
    run("quality_peers", "--text", text, "--gguf", text, "--directory", tmp_path, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["key"], row["kl_mean"], row["same_top_percent"]) for row in found][:1] == [("q8_0", 0.01, 95.5)]
    assert "+2.50 %" in (tmp_path / "r.md").read_text()


def test_laboratory(run: Run, model: str, text: Path, tmp_path: Path) -> None:
    shutil.copy(text, tmp_path / "wiki.test.raw")
    shutil.copy(text, tmp_path / "moby_dick.txt")
    small = ("--context", 256, "--task-context", 256, "--texts", 1, "--new-tokens", 8, "--dtypes", "int4")
    common = ("--model", model, "--data-dir", tmp_path, "--out", tmp_path / "out", "--tasks", "fidelity,layers", *small)
    run("laboratory", *common)
    rows = json.loads((tmp_path / "out" / "laboratory.json").read_text())["results"]
    assert [row["dtype"] for row in rows] == ["int4", "int4 with scales off by 5 %"]
    assert (tmp_path / "out" / "laboratory.html").stat().st_size > 1000
    module = importlib.import_module("laboratory")
    shutil.rmtree(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["laboratory.py", *map(str, common), "--limit", "0.01"])
        assert module.main() == 1


# The server


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a script's server be one in this process; its command line must be one that ``kvbits serve`` takes."""
    servers = importlib.import_module("servers")

    @contextmanager
    def serving(command: Sequence[str]) -> Iterator[Any]:
        serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
        asked = serve.make_context("serve", list(command[2:])).params
        loaded = byte_model()
        seats, caching = asked["max_num_seqs"], asked["enable_prefix_caching"]
        dtype = asked["kv_cache_dtype"]
        engine = engine_of(loaded, kv_cache_dtype=dtype, max_num_seqs=seats, enable_prefix_caching=caching)
        with running(engine) as server:
            yield servers.Serving(find_target(server.url, None, None), psutil.Process())

    def stand_in(name: str) -> None:
        module, loads = importlib.import_module(name), importlib.import_module("loads")
        monkeypatch.setattr(module, "serving", serving)
        monkeypatch.setattr(module, "sampled", lambda look, seconds: loads.sampled(look, 0.01), raising=False)

    return stand_in


def test_concurrency(run: Run, here: Callable[[str], None], text: Path, tmp_path: Path) -> None:
    here("concurrency")
    small = ("--kv-cache-dtype", "bf16", "int4", "--sessions", 3, "--prompt-tokens", 200, "--new-tokens", 400)
    run("concurrency", "--text", text, *small, "--json", tmp_path / "r.json")
    assert [row["dtype"] for row in results(tmp_path / "r.json")["rows"]] == ["bf16", "int4"]


def test_agent_sessions(run: Run, here: Callable[[str], None], tmp_path: Path) -> None:
    here("agent_sessions")
    turns = [{"role": role, "content": f"{role} says {i}. " * 10} for i in range(2) for role in ("user", "assistant")]
    (tmp_path / "agent.json").write_text(json.dumps({"messages": turns}))
    (tmp_path / "chat.jsonl").write_text(2 * (json.dumps({"prompt": "a long question " * 8}) + "\n"))
    small = ("--new-tokens", 4, "--chat-tokens", 4, "--turns", 2)
    files = ("--agent", tmp_path / "agent.json", "--chat", tmp_path / "chat.jsonl")
    run("agent_sessions", *files, *small, "--json", tmp_path / "r.json")
    assert results(tmp_path / "r.json")["cases"]


def test_mooncake(run: Run, here: Callable[[str], None], text: Path, tmp_path: Path) -> None:
    here("mooncake")
    trace = [{"timestamp": i, "input_length": 600, "output_length": 3, "hash_ids": [0, i]} for i in range(3)]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trace))
    run("mooncake", "--trace", tmp_path / "trace.jsonl", "--text", text, "--json", tmp_path / "r.json")
    found = results(tmp_path / "r.json")
    assert [row["completed"] for row in found["rows"]] == [3, 3]
    on, off = found["rows"]
    assert on["hit rate"] > 0.3 > off["hit rate"] == 0


def test_server_overhead(run: Run, model: str, text: Path, tmp_path: Path) -> None:
    small = ("--batch", 2, "--prompt-tokens", 64, "--new-tokens", 4, "--rounds", 1, "--threads", 1)
    run(
        "server_overhead",
        "--model",
        model,
        "--text",
        text,
        *small,
        "--kv-cache-memory",
        "4MiB",
        "--json",
        tmp_path / "r.json",
    )
    assert results(tmp_path / "r.json")["cases"]


def test_conformance(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a schema that says nothing, and one that no answer fits."""
    module = importlib.import_module("conformance")
    source = (ROOT / "conformance.py").read_text("utf-8")
    names = re.findall(r"\w+(?:Response|Request)\b", source)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"turns": ["a question"]}) + "\n")
    with running(engine_of(byte_model())) as server:
        for definition, status in (({"type": "object"}, 0), ({"type": "string"}, 1)):
            schema = {"$defs": dict.fromkeys(names, definition)}
            (tmp_path / "schema.json").write_text(json.dumps(schema))
            options = ("--schema", tmp_path / "schema.json", "--url", server.url, "--new-tokens", 3)
            monkeypatch.setattr(sys, "argv", ["conformance.py", *map(str, options), str(tmp_path / "chat.jsonl")])
            with pytest.raises(SystemExit) as caught:
                module.main()
            assert caught.value.code == status, capsys.readouterr().out


def test_round_trip(run: Run, model: str, tmp_path: Path) -> None:
    small = ("--windows", 1, "--context", 128, "--rest", 64, "--kv-cache-dtype", "int8", "int4")
    run("round_trip", model, *small, "--json", tmp_path / "r.json")
    int8, int4 = results(tmp_path / "r.json")["rows"]
    assert 0 < int8["trip"] < int4["trip"]
    assert int4["trip"] < 3 * int4["own"]


def test_chunk_speed(run: Run, tmp_path: Path) -> None:
    run("chunk_speed", "--policy", "int4", "--tokens", 256, "--repeats", 1, "--json", tmp_path / "c.json")
    (row,) = results(tmp_path / "c.json")["rows"]
    assert row["times_fewer_bytes"] > 3.5
    assert min(row["encode_gb_s"], row["decode_gb_s"]) > 0


def test_vllm_plugin(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With workers that answer for vLLM's, and say how long a prompt may be."""
    worker = tmp_path / "python"
    worker.write_text(
        f"#!{sys.executable}\nimport sys, json\nprint('RESULT', 0, flush=True)\nfor line in sys.stdin:\n"
        "    asked = json.loads(line)\n    longest, batch = map(int, sys.argv[4:6])\n"
        "    assert asked.get('prefill', 0) < longest and asked.get('context', 0) + asked.get('steps', 0) < longest\n"
        "    print('RESULT', 20 if sys.argv[3] == 'int4' else 10, flush=True)\n"
    )
    worker.chmod(0o755)
    monkeypatch.setattr(importlib.import_module("vllm_plugin"), "PAUSE", 0)
    small = ("--caches", "auto", "int4", "--case", "2x100", "--prefill", 300, "--steps", 4, "--repeats", 2)
    run("vllm_plugin", tmp_path, "--python", worker, *small, "--json", tmp_path / "v.json")
    rows = results(tmp_path / "v.json")["rows"]
    assert [(row["case"], row["cache"], row["ratio"]) for row in rows] == [
        ("prefill", "auto", 1), ("prefill", "int4", 2), ("2 x 100", "auto", 1), ("2 x 100", "int4", 2),
    ]  # fmt: skip
