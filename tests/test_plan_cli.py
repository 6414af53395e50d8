"""``kvbits plan``: its JSON, its pictures, and one clear line for every mistake of a user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import status

COMMON = ("plan", "llama-3.1-8b", "--memory", "80GiB", "--weights", "bf16")


def test_a_long_context_model_from_16_bit_to_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    dtypes = ("--kv-cache-dtype", "bf16", "--kv-cache-dtype", "int8")
    code = status(*COMMON, "--context", 131072, "--context", 8192, *dtypes, "--json", out, "--picture", picture)
    assert code == 0
    document = json.loads(out.read_text())
    half, eight = document["schemes"]
    assert (half["dtype"], eight["dtype"]) == ("bf16", "int8")
    assert half["bits_per_element"] == 16
    assert half["kv_bytes_per_token"] == 131072
    # 80 GiB less 2 bytes for each of 8.03e9 parameters is about 65 GiB; a session of 128Ki tokens takes 16 GiB
    cache = (80 << 30) - 2 * 8030261248 - document["workspace_bytes"]
    assert half["sessions"] == cache // (2049 * (8 << 20)) == 4
    assert eight["sessions"] == 7
    assert eight["gain_over_16bit"] == pytest.approx(16 / 8.3125, rel=0.01)
    assert [c["context"] for c in eight["contexts"]] == [131072, 8192]
    assert half["longest_context"] == eight["longest_context"] == 131072
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "llama-3.1-8b" in capsys.readouterr().out


def test_a_policy_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "mixed"
    directory.mkdir()
    layers = ["int4"] * 16 + ["int8/int4"] * 16
    (directory / "policy.json").write_text(json.dumps({"layers": layers, "sink": ["int8"] * 32}))
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 40 * i, "input_length": 9000, "output_length": 200} for i in range(60)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "plan.json"
    code = status(
        *COMMON[:2], "--memory", "32GiB", "--weights", "bf16", "--kv-cache-dtype", "bf16", "--policy", directory,
        "--trace", trace, "--load", 1, "--load", 0.01, "--json", out,
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    document = json.loads(out.read_text())
    names = [s["dtype"] for s in document["schemes"]]
    assert names == ["bf16", "mixed"]
    # 64 tokens by 128: 4 or 8 bits and two float16 for each channel or token
    keys4, values4, keys8 = 4 + 32 / 64, 4 + 32 / 128, 8 + 32 / 64
    expected = (16 * (keys4 + values4) + 16 * (keys8 + values4)) / 64
    assert document["schemes"][1]["bits_per_element"] == pytest.approx(expected)
    runs = {(r["dtype"], r["load"]): r for r in document["trace"]["runs"]}
    assert set(runs) == {(d, x) for d in names for x in (1, 0.01)}
    assert all(r["requests"] == 60 and r["refused"] == 0 for r in runs.values())
    assert runs["bf16", 1]["wait_mean_s"] > 1.2 * runs["mixed", 1]["wait_mean_s"] > 1
    assert runs["bf16", 0.01]["waited"] == 0


def test_list_names_the_tables_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("plan", "list") == 0
    assert {"llama-3.1-8b", "qwen3-32b", "deepseek-v3"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "llama-3.1-8b"), "--memory"),
        (("plan", "no/such-thing.json", "--memory", "1GiB"), "no/such-thing.json"),
        ((*COMMON, "--context", "0"), "a context of 0 tokens"),
        ((*COMMON, "--context", "200000"), "1 to 131072"),
        ((*COMMON, "--kv-cache-dtype", "int9"), "int9"),
        ((*COMMON, "--policy", "nowhere"), "nowhere"),
        ((*COMMON, "--tensor-parallel-size", "3"), "3 ranks"),
        ((*COMMON, "--picture", "plan.txt"), "plan.txt"),
        ((*COMMON, "--trace", "nowhere.csv"), "nowhere.csv"),
        ((*COMMON, "--max-model-len", "0"), "max_model_len is 0"),
        ((*COMMON, "--max-num-batched-tokens", "0"), "'--max-num-batched-tokens'"),
        (("plan", "llama-3.1-8b", "--memory", "80GiB", "--weights", "bf17"), "bf17"),
        (("plan", "llama-3.1-8b", "--memory", "8 parsecs"), "8 parsecs"),
        (("plan", "llama-3.1-8b", "--memory", "8GiB"), "leave nothing"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: tuple[object, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvbits: error: ")
    assert error.count("\n") == 1
    assert words in error


def test_bad_loads_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 10, "output_length": 2}')
    for option, value in (("--load", 0), ("--load", -1), ("--tflops", 0), ("--trace-requests", 0)):
        assert status(*COMMON, "--kv-cache-dtype", "int8", "--trace", trace, option, value) == 2
        assert "positive" in (error := capsys.readouterr().err) or "at least one" in error
