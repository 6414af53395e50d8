"""The command line: results and JSON on a tiny model, and one clear line for every mistake of a user's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import complaint, status
from helpers.tiny import VOCAB, save, tiny_model, tiny_tokenizer

from kvbits.evaluation.drive import Step

CONTEXT = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny_model("llama", max_position_embeddings=CONTEXT), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{4 + (i * i + i // 7) % (VOCAB - 4)}" for i in range(1200)))
    return str(path)


# What works


def test_generate_streams_text_and_writes_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "generate.json"
    common = (
        model, "--max-tokens", 9, "--dtype", "float32", "--temperature", 0, "--kv-cache-dtype", "int8", "--json", out,
    )  # fmt: skip
    assert status("generate", *common, "-p", "w5 w6 w7") == 0
    shown, notes = capsys.readouterr()
    result = json.loads(out.read_text())["results"][0]
    assert shown == result["text"] + "\n"
    assert result["prompt_tokens"] == 3
    assert len(result["token_ids"]) == 9 or result["finish_reason"] == "stop"
    assert ("[cut by --max-tokens, 9]" in notes) is (result["finish_reason"] == "length")
    ids = [t for t in result["token_ids"] if t > 2]
    assert result["text"].split() == [tiny_tokenizer().convert_ids_to_tokens(t) for t in ids]
    # The same prompt from a file, beside another one, gives the same text.
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("w5 w6 w7")
    assert status("generate", *common, "-p", "w8 w9", "--prompt-file", prompt) == 0
    assert json.loads(out.read_text())["results"][1]["token_ids"] == result["token_ids"]
    assert capsys.readouterr().out.count("===") == 2


def test_sampling_options_reach_the_sampler(model: str, tmp_path: Path) -> None:
    common = (model, "-p", "w5 w6", "--max-tokens", 20, "--kv-cache-dtype", "int8")

    def tokens(*options: object) -> list[int]:
        out = tmp_path / "sampled.json"
        assert status("generate", *common, "--json", out, *options) == 0
        found: list[int] = json.loads(out.read_text())["results"][0]["token_ids"]
        return found

    assert tokens("--temperature", 3, "--seed", 1) == tokens("--temperature", 3, "--seed", 1)
    assert tokens("--temperature", 3, "--seed", 1) != tokens("--temperature", 3, "--seed", 2)
    greedy = tokens("--temperature", 0)
    assert tokens("--temperature", 3, "--seed", 1, "--top-k", 1) == greedy
    assert tokens("--temperature", 3, "--seed", 1, "--top-p", 1e-9) == greedy
    assert tokens("--temperature", 3, "--seed", 1, "--min-p", 1) == greedy
    for penalty in (("--repetition-penalty", 9), ("--presence-penalty", 2), ("--frequency-penalty", 2)):
        assert len(set(tokens("--temperature", 0, *penalty))) >= len(set(greedy)), penalty
    assert len(set(tokens("--temperature", 0, "--repetition-penalty", 9))) == 20


def test_evaluate_writes_every_figure(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluate.json"
    common = ("evaluate", model, "--text", text, "--context", 256, "--windows", 2, "--json", out)
    assert status(*common, "--kv-cache-dtype", "int4") == 0
    assert "int4" in capsys.readouterr().out
    found = json.loads(out.read_text())
    keys = "perplexity perplexity_16bit kl_mean kl_p99 top1_agreement bits_per_element effective_bits_per_element"
    assert set(keys.split()) <= set(found)
    assert (found["windows"], found["context"], found["tokens"], found["dtype"]) == (2, 256, 2 * 127, "int4")
    assert found["compute_dtype"] == "float32"
    assert 0 < found["kl_mean"] < found["kl_p99"] <= found["kl_max"]
    # 256 tokens are full pages: the open page comes on top, for 1/4 of the sealed ones' tokens at 16 bit or more.
    assert found["effective_bits_per_element"] >= found["bits_per_element"] + 16 / 4


def test_several_dtypes_are_ordered_and_16_bit_differs_by_nothing(model: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "evaluate.json"
    dtypes = ("bf16", "int8", "int4", "int2", "0:int8,1-2:int8/int4")
    options = [part for dtype in dtypes for part in ("--kv-cache-dtype", dtype)]
    assert status("evaluate", model, "--text", text, "--context", 256, "--windows", 1, "--json", out, *options) == 0
    found = json.loads(out.read_text())
    assert "kl_mean" not in found
    rows = {row["dtype"]: row for row in found["results"]}
    assert tuple(rows) == dtypes
    assert rows["bf16"]["kl_max"] == 0.0
    assert rows["bf16"]["perplexity"] == rows["bf16"]["perplexity_16bit"]
    assert 0 < rows["int8"]["kl_mean"] < rows["int4"]["kl_mean"] < rows["int2"]["kl_mean"]
    assert rows["int8"]["bits_per_element"] > rows["0:int8,1-2:int8/int4"]["bits_per_element"]


def test_evaluate_agrees_with_transformers_own_cache(model: str, text: str, tmp_path: Path) -> None:
    """Perplexity of the 16-bit cache against the plain model in float32: only bfloat16 keys and values differ."""
    import torch
    from transformers import AutoModelForCausalLM

    out = tmp_path / "evaluate.json"
    options = ("--context", 256, "--windows", 2, "--kv-cache-dtype", "int8", "--json", out)
    assert status("evaluate", model, "--text", text, *options) == 0
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor(tiny_tokenizer()(Path(text).read_text(), add_special_tokens=False)["input_ids"][:512])
    with torch.inference_mode():
        logits = plain(ids.view(2, 256)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, 128:255].flatten(0, 1), ids.view(2, 256)[:, 129:].flatten())
    assert json.loads(out.read_text())["perplexity_16bit"] == pytest.approx(math.exp(loss), rel=2e-3)


def test_bench_measures_prefill_and_decode(model: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ("--context", 200, "--batch", 3, "--new-tokens", 5, "--kv-cache-dtype", "int8", "--text", text)
    assert status("bench", model, *options, "--max-num-batched-tokens", 128, "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["decode_tokens_per_s"] == pytest.approx(3 / (found["decode_step_ms"] / 1000))
    assert found["prefill_tokens_per_s"] > 0
    assert found["peak_rss_bytes"] > found["pool_bytes"] > 0
    # 3 layers x 2 heads x (16 + 16) elements at 8 bits; of 64 tokens, keys have 16 bits of scale and of zero for each
    # channel, values 16 bits of scale for each token
    assert found["kv_bytes_per_token"] == 3 * 2 * ((16 + 4 * 16 / 64) + (16 + 2))
    # 3 full pages and an open one, which takes two frames
    assert found["kv_bytes_per_session"] == (3 + 2) * 64 * found["kv_bytes_per_token"]
    assert {"threads", "isa", "dtype", "context", "batch"} <= set(found)


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from kvbits.cli.main import run; run()", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    for command in ("generate", "evaluate", "bench", "demo"):
        assert command in done.stdout


# What does not


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("int7", "unknown KV cache dtype 'int7'; choose from bf16, int8"),
        ("int8,int4,int2", "names 3 dtypes"),
        ("0-9:int8", "the model's layers are 0 to 2"),
        ("0:int8", "says nothing of layer 1, 2"),
        ("0-2:int8,1:int4", "names layer 1 twice"),
        ("0-x:int8", "is not LAYER:DTYPE"),
        ("", "is empty"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "evaluate", "bench"])
def test_impossible_dtypes(
    model: str, text: str, capsys: pytest.CaptureFixture[str], command: str, dtype: str, words: str
) -> None:
    extra = {"generate": ("-p", "w5"), "evaluate": ("--text", text, "--context", 256, "--windows", 1), "bench": ()}
    if command == "bench":
        extra["bench"] = ("--context", 64, "--batch", 1, "--new-tokens", 1)
    assert words in complaint(capsys, command, model, "--kv-cache-dtype", dtype, *extra[command])


def test_models_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt, fake, empty = tmp_path / "corrupt.gguf", tmp_path / "fake.gguf", tmp_path / "empty"
    corrupt.write_bytes(b"GGUF" + bytes(range(64)))
    fake.write_bytes(b"not a model")
    empty.mkdir()
    ask = ("-p", "hello")
    assert "does not exist" in complaint(capsys, "generate", tmp_path / "none", *ask)
    assert "corrupt.gguf" in complaint(capsys, "generate", corrupt, *ask)
    assert "is not a GGUF file" in complaint(capsys, "generate", fake, *ask)
    assert "config.json" in complaint(capsys, "generate", empty, *ask)


def test_texts_that_cannot_be_read(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin, short = tmp_path / "latin.txt", tmp_path / "short.txt"
    latin.write_bytes(b"\xff\xfe\x00")
    short.write_text("w5 w6 w7")
    common = ("evaluate", model, "--kv-cache-dtype", "int8", "--context", 256, "--windows", 2, "--text")
    assert "No such file" in complaint(capsys, *common, tmp_path / "none.txt")
    assert "not UTF-8" in complaint(capsys, *common, latin)
    assert "the text has 8 bytes, and so at most as many tokens; 2 windows of 256 need 512" in complaint(
        capsys, *common, short
    )
    assert "not UTF-8" in complaint(capsys, "generate", model, "--prompt-file", latin)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-cache-memory", "0"), "must be positive"),
        (("--kv-cache-memory", "lots"), "'lots' is not a size"),
        (("--kv-cache-memory", "1KiB"), "one session needs"),
        (("--max-model-len", "100000"), f"the context of {{model}} is {CONTEXT} tokens"),
        (("--max-num-seqs", "0"), "max_num_seqs is 0"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--dtype", "float7"), "unknown model dtype 'float7'"),
        (("--threads", "0"), "'--threads'"),
        (("--device", "nowhere"), "the device 'nowhere' cannot be used here"),
        (("--max-tokens", "many"), "'--max-tokens'"),
        (("--no-such-option",), "no-such-option"),
    ],
)
def test_impossible_options(
    model: str, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    line = complaint(capsys, "generate", model, "-p", "w5", *options)
    assert words.format(model=model) in line


def test_a_prompt_or_window_over_the_context(model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{CONTEXT} tokens" in complaint(
        capsys, "generate", model, "--kv-cache-dtype", "int8", "--prompt-file", text
    )
    long = ("--kv-cache-dtype", "int8", "--context", 2 * CONTEXT)
    assert f"{CONTEXT} tokens" in complaint(capsys, "evaluate", model, "--text", text, "--windows", 1, *long)
    assert f"{CONTEXT} tokens" in complaint(capsys, "bench", model, "--batch", 1, *long)
    tight = ("--kv-cache-dtype", "int8", "--context", CONTEXT)
    assert f"{CONTEXT} tokens" in complaint(capsys, "bench", model, "--text", text, "--batch", 1, *tight)


def test_missing_and_out_of_range_arguments(model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no prompt" in complaint(capsys, "generate", model)
    assert "MODEL" in complaint(capsys, "generate")
    assert "serv" in complaint(capsys, "serv")
    common = ("evaluate", model, "--text", text, "--kv-cache-dtype", "int8")
    assert "'--context': Input should be greater than or equal to 4" in complaint(capsys, *common, "--context", 2)
    assert "'--windows': Input should be greater" in complaint(capsys, *common, "--windows", 0, "--context", 64)
    assert "'--batch'" in complaint(capsys, "bench", model, "--kv-cache-dtype", "int8", "--batch", 0)


def test_results_that_cannot_be_written_stop_the_work_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, "generate", "no-such-model", "-p", "x", "--json", tmp_path / "none" / "out.json")
    assert "cannot write to" in line
    (tmp_path / "file").write_text("")
    assert "cannot make the directory" in complaint(capsys, "demo", "--output", tmp_path / "file" / "out")


def test_a_refused_run_leaves_no_results_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    complaint(capsys, "generate", model, "-p", "w5", "--kv-cache-dtype", "int7", "--json", out)
    assert not out.exists()


def test_the_program_itself_exits_with_2_and_one_line(model: str) -> None:
    program = [sys.executable, "-c", "from kvbits.cli.main import run; run()", "generate", model, "-p", "w5"]
    done = subprocess.run([*program, "--kv-cache-memory", "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Loading ")]
    assert lines == ["kvbits: error: the size '0' is 0 bytes; it must be positive"]


def test_interrupting_is_one_line(
    model: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> Step:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvbits.engine.engine.Engine.step", interrupted)
    assert status("generate", model, "-p", "w5") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "kvbits: interrupted"
