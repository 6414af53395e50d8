"""Mistakes are told from the arguments and the model's files alone: before torch is there, and so before any load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.gguf_files import save_gguf
from helpers.tiny import FAMILIES, save, tiny_config, tiny_model
from transformers import PreTrainedConfig

from kvbits.codecs import SCHEMES, parse_policy
from kvbits.codecs.names import DTYPES, parse_names
from kvbits.errors import KVBitsError
from kvbits.evaluation.parts import NAMES
from kvbits.evaluation.tasks import TASKS
from kvbits.models import geometry_of
from kvbits.models.gguf import GgufFile, configuration
from kvbits.models.outline import outline_of

CONTEXT = 512
HEAVY = ("torch", "transformers", "tokenizers")
PROGRAM = f"""
import contextlib, io, json, sys
from kvbits.cli.main import run
found = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run(arguments)
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny_model("llama", max_position_embeddings=CONTEXT), tmp_path_factory.mktemp("model"))


def answers(commands: list[list[str]], folder: Path) -> list[tuple[int, str, list[str]]]:
    """Exit status, what is said, and which large libraries are loaded after each of ``commands``, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(commands), capture_output=True, text=True, cwd=folder,
        check=True, timeout=300,
    )  # fmt: skip
    return [(code, said, heavy) for code, said, heavy in json.loads(done.stdout)]


def mistakes(model: str) -> list[tuple[str, str]]:
    """Commands that are refused, and a part of the line that says why; ``MODEL`` is a model that loads."""
    every = [
        ("generate MODEL -p x", "--kv-cache-dtype"), ("serve MODEL", "--kv-cache-dtype"),
        ("chat MODEL", "--kv-cache-dtype"), ("cache save MODEL out.pages -p x", "--kv-cache-dtype"),
        ("cache load MODEL text.txt", "--kv-cache-dtype"), ("evaluate MODEL --text text.txt", "--kv-cache-dtype"),
        ("bench MODEL", "--kv-cache-dtype"), ("advise MODEL --text text.txt --memory 1MiB --context 64",
        "--kv-cache-dtype"), ("calibrate MODEL -o out --bits 4", "--sink"),
    ]  # fmt: skip
    found = []
    for command, option in every:
        found += [
            (f"{command} {option} int7", "unknown KV cache dtype 'int7'"),
            (f"{command.replace('MODEL', './none')} {option} int8", "the model './none' does not exist"),
            (f"{command.replace('MODEL', 'cut.gguf')} {option} int8", "ends inside its header"),
        ]
        if option == "--kv-cache-dtype":
            found += [
                (f"{command} {option} 0-9:int8", "the model's layers are 0 to 2"),
                (f"{command} {option} mix8_4", "head size 16 is not a multiple of 64"),
                (f"{command} --kv-policy none", "policy.json': No such file"),
                (f"{command} --kv-policy other", "has 2 layers; "),
            ]
    for command in ("generate MODEL -p x", "serve MODEL", "chat MODEL", "cache save MODEL out.pages -p x"):
        found += [
            (f"{command} --kv-cache-memory 1KiB", "kv_cache_memory is 1 KiB; one session needs"),
            (f"{command} --kv-cache-memory 9999TiB", "there is no memory for"),
            (f"{command} --kv-cache-memory lots", "'lots' is not a size"),
            (f"{command} --dtype float7", "unknown model dtype 'float7'"),
            (f"{command} --threads 99999", "'--threads'"),
        ]
    for command in ("generate MODEL -p x", "serve MODEL"):
        found += [
            (f"{command} --max-model-len 9999", f"the context of {model} is {CONTEXT} tokens"),
            (f"{command} --max-num-seqs 0", "max_num_seqs is 0"),
            (f"{command} --weights int3", "unknown weights 'int3'"),
            (f"{command} --device nowhere", "the device 'nowhere' cannot be used here"),
            (f"{command} --speculative-config eagle", "choose from ngram, draft_model, self"),
            (f"{command} --speculative-config {{", "is no JSON"),
        ]
    found += [
        ("generate MODEL -p ''", "a prompt is empty"),
        ("generate MODEL", "there is no prompt"),
        ("generate MODEL -p x --temperature -1", "temperature is -1"),
        ("generate MODEL -p x --repetition-penalty 99", "repetition_penalty is 99"),
        ("generate MODEL --prompt-file none.txt", "No such file"),
        ("generate MODEL -p x --json none/out.json", "cannot write to"),
        ("generate MODEL -p x --chat", "has no chat template"),
        ("chat MODEL", "has no chat template"),
        ("serve MODEL --port 0", "port is 0"),
        ("serve MODEL --host nowhere.invalid", "cannot listen on nowhere.invalid"),
        ("serve MODEL --max-queue 0", "max_queue is 0"),
        ("serve MODEL --cache-file none", "cannot read 'none'"),
        ("serve MODEL --kv-offload-size 1MiB --kv-offload-path none/x", "there is no directory"),
        ("serve MODEL --allowed-origins nowhere", "allowed_origins holds 'nowhere'"),
        ("serve MODEL --ray-replicas 2", "--ray-replicas goes with --ray"),
        ("serve MODEL --ray-routing random", "--ray-routing goes with --ray"),
        ("serve MODEL --ray --ray-replicas none", "ray_replicas is 'none'"),
        ("serve MODEL --ray --ray-replicas 3-2", "3 to 2 replicas"),
        ("serve MODEL --ray --ray-routing nearest", "unknown routing 'nearest'"),
        ("serve MODEL --log-level loud", "log level 'loud' is unknown"),
        ("evaluate MODEL --text none.txt --kv-cache-dtype int8", "No such file"),
        ("evaluate MODEL --text text.txt --kv-cache-dtype int8 --tasks nope", "unknown task 'nope'"),
        ("evaluate MODEL --text text.txt --kv-cache-dtype int8 --context 9999", f"over the {CONTEXT} tokens"),
        ("evaluate MODEL --text text.txt --kv-cache-dtype int8 --task-dtype f8", "unknown model dtype 'f8'"),
        ("evaluate MODEL --text text.txt --kv-cache-dtype int8 --windows 0", "'--windows'"),
        ("evaluate MODEL --text text.txt --kv-cache-dtype int8 --context 512 --windows 9", "has 3,600 bytes"),
        ("advise MODEL --text text.txt --memory 1GiB --context 64 --window 512 --windows 9", "has 3,600 bytes"),
        ("calibrate MODEL -o out --bits 4 --text text.txt --window 512", "has 3,600 bytes"),
        ("calibrate MODEL -o out --bits 99", "the model's own cache has 16"),
        ("serve MODEL --kv-offload-size 9", "kv_offload_size is 9 bytes; one page needs at least"),
        ("demo --kv-cache-memory 1MiB", "one conversation in 16 bit needs"),
        ("calibrate MODEL -o out --bits 4 --window 64", "windows of 64 tokens are too short; at least 192"),
        ("quantize MODEL -o out --weights int3", "choose from int4, int8"),
        ("quantize MODEL -o out --window 9999", f"over the {CONTEXT} tokens"),
        ("quantize MODEL -o out --text text.txt --window 512", "has 3,600 bytes"),
        ("quantize MODEL -o MODEL", "is not empty"),
        ("quantize cut.gguf -o out", "ends inside its header"),
        ("bench MODEL --kv-cache-dtype int8 --context 9999", f"over the {CONTEXT} tokens"),
        ("calibrate MODEL -o out --bits 4 --max-kl 1", "exactly one of"),
        ("calibrate MODEL -o out --bits 4 --context 9999", f"over the {CONTEXT} tokens"),
        ("demo MODEL --sessions 0", "'--sessions'"),
        ("demo MODEL --document-tokens 9999", f"over the {CONTEXT} tokens"),
        ("cache load MODEL none", "cannot read 'none'"),
        ("export MODEL --to modelopt --text none.txt -o out", "No such file"),
        ("export MODEL --to modelopt --text text.txt -o out --window 512 --windows 9", "has 3,600 bytes"),
        ("export MODEL --to nothing", "choose from"),
        ("export MODEL --to flags --kv-cache-dtype int7", "unknown KV cache dtype 'int7'"),
        ("plan llama-3.1-8b --memory 80GiB --kv-cache-dtype int7", "unknown KV cache dtype 'int7'"),
        ("plan llama-3.1-8b --memory lots", "'lots' is not a size"),
    ]  # fmt: skip
    return found


def test_mistakes_are_told_before_torch_is_loaded(model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w5 w6 w7 " * 400)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes([9] * 8))
    (tmp_path / "other").mkdir()
    policy = {"format": "kvbits-policy", "version": 2, "layers": ["int8", "int8"], "sink": None}
    (tmp_path / "other" / "policy.json").write_text(json.dumps(policy))
    (tmp_path / "other" / "rounding.safetensors").touch()
    asked = mistakes(model)
    words = [
        [model if w == "MODEL" else "" if w == "''" else w for w in command.split()] for command, _ in asked
    ]  # fmt: skip
    wrong = []
    for (command, named), (code, said, heavy) in zip(asked, answers(words, tmp_path), strict=True):
        lines = said.splitlines()
        if code != 2 or len(lines) != 1 or named not in lines[0] or heavy:
            wrong.append((command, named, code, said[-300:], heavy))
    assert not wrong, "\n".join(map(str, wrong))
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "cut.gguf", "other"}, "refused runs leave nothing"


def test_help_and_version_need_no_torch(tmp_path: Path) -> None:
    commands = [[], ["--help"], ["--version"], ["serve", "--help"], ["generate", "--help"], ["plan", "list"]]
    for (code, said, heavy), command in zip(answers(commands, tmp_path), commands, strict=True):
        assert (code, heavy) == (0 if command else 2, []), (command, code, said, heavy)


def test_the_names_are_those_of_the_schemes() -> None:
    assert tuple(DTYPES) == tuple(SCHEMES)
    for name, scheme in SCHEMES.items():
        dtype = DTYPES[name]
        assert (dtype.key_multiple, dtype.value_multiple) == (scheme.key.dim_multiple, scheme.value.dim_multiple), name
    assert ("fidelity", "layers", *TASKS, "generation", "tools", "gsm8k") == NAMES


@pytest.mark.parametrize(
    "text", [*SCHEMES, "int8,int4", "0:int8,1-2:nf3/mix8_4", "int4+sink:int8", "0-2:int5+sink:bf16"]
)
def test_names_and_policies_refuse_the_same_heads(text: str) -> None:
    for dims in (16, 32, 48, 64, 80, 96, 128):
        geometry = geometry_of(tiny_config("llama", head_dim=dims))
        said = []
        for policy in (parse_names(text, 3), parse_policy(text, 3)):
            try:
                policy.check(geometry)
                said.append("")
            except KVBitsError as error:
                said.append(str(error))
        assert said[0] == said[1], dims


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_is_what_the_model_measures(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    check(str(tmp_path), config)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_an_outline_of_a_gguf_file(family: str, tmp_path: Path) -> None:
    loaded = tiny_model(family)
    path = tmp_path / "model.gguf"
    save_gguf(loaded, path)
    check(str(path), configuration(GgufFile(path)))
    data = path.read_bytes()
    for size in (40, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(KVBitsError, match=r"model\.gguf.*(ends inside its header|it is cut off; tensor)"):
            outline_of(str(path))


def check(name: str, config: PreTrainedConfig) -> None:
    measured, outline = geometry_of(config), outline_of(name)
    assert (outline.num_layers, outline.max_position) == (measured.num_layers, measured.max_position)
    if hasattr(config, "kv_lora_rank"):  # latents or every head's keys: only a trial says which
        assert outline.geometry is None
        return
    assert outline.geometry is not None
    for said, layer in zip(outline.geometry.layers, measured.layers, strict=True):
        for field in ("num_heads", "num_kv_heads", "key_dim", "value_dim", "window"):
            assert getattr(said, field) == getattr(layer, field), field
