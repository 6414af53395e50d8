"""lm-evaluation-harness on our engine, against its own ``hf`` model on transformers' attention."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from helpers.hugging_face import EAGER, hugging_face_model
from helpers.serving import byte_tokenizer
from helpers.tiny import save
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvbits.errors import ConfigError, RequestError
from kvbits.lm_eval import register
from kvbits.lm_eval import task as task_module
from kvbits.lm_eval.__main__ import main
from kvbits.lm_eval.arguments import Generation
from kvbits.lm_eval.model import KVBitsLM

CONTEXT = 400
EXAMPLE = Path(__file__).parents[1] / "examples" / "lm_eval_local.py"
TEXTS = [f"{i} {'abcdefghij klmnop'[i:]} " * (3 + 9 * i) for i in range(6)]

HEAD = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: {output_type}
"""
TASKS = {
    "choices": (
        "multiple_choice",
        'doc_to_text: "{{text}}"\ndoc_to_choice: ["x", " yes", " no no"]\ndoc_to_target: 1\n',
    ),
    "text": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n',
    ),
    "answers": (
        "generate_until",
        'doc_to_text: "{{text}}"\ndoc_to_target: "x"\nmetric_list: [{metric: exact_match}]\n'
        'generation_kwargs: {until: ["\\n", "z"], max_gen_toks: 20, do_sample: false}\n',
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind on the same texts."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS), encoding="utf-8")
    for task, (output_type, rest) in TASKS.items():
        head = HEAD.format(task=task, data=data, cache=folder / "cache", output_type=output_type)
        (folder / f"{task}.yaml").write_text(head + rest, encoding="utf-8")
    return folder


def model_of(family: str) -> torch.nn.Module:
    return hugging_face_model(family, vocab_size=259, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(model_of("llama"), tmp_path_factory.mktemp("model"), byte_tokenizer)


def responses(lm: Any, tasks: Path, **options: Any) -> dict[str, list[Any]]:
    """What the model answered to every request of every task, in order."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, random_seed=None, **options
    )
    return {task: [r for s in results["samples"][task] for r in s["filtered_resps"]] for task in TASKS}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2", "bamba"])
def test_every_kind_of_request_is_answered_as_the_hf_model_does(family: str, tmp_path: Path, tasks: Path) -> None:
    """Full attention, mostly windows, recurrent layers of both kinds."""
    register()
    model = model_of(family)
    path = save(model, tmp_path, byte_tokenizer)
    model.set_attn_implementation(EAGER)
    # what fits the engine's context is what fits an hf model's that is 2 shorter
    own = HFLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=CONTEXT - 2, batch_size=1)
    expected = responses(own, tasks)
    options = {"pretrained": path, "kv_cache_dtype": "bf16", "kv_cache_memory": "16MiB", "dtype": "float32"}
    got = responses("kvbits", tasks, model_args=options, batch_size=4)
    assert any(len(t) > CONTEXT for t in TEXTS)
    for (value, greedy), (other, other_greedy) in zip(got["choices"], expected["choices"], strict=True):
        assert value == pytest.approx(other, rel=1e-3, abs=5e-3)
        assert greedy == other_greedy
    assert got["text"] == pytest.approx(expected["text"], rel=1e-3)
    assert got["answers"] == expected["answers"]
    assert len(set(got["answers"])) > 1


def test_the_cache_dtype_is_used(path: str, tasks: Path) -> None:
    options = {"pretrained": path, "kv_cache_memory": "16MiB", "dtype": "float32"}
    register()
    exact = responses("kvbits", tasks, model_args={**options, "kv_cache_dtype": "bf16"})
    rough = responses("kvbits", tasks, model_args={**options, "kv_cache_dtype": "int2"})
    long = [i for i, text in enumerate(TEXTS) if len(text) > 70]
    assert all(exact["text"][i] != rough["text"][i] for i in long)
    assert exact["text"] == pytest.approx(rough["text"], rel=0.2)


def test_registration_is_lazy_and_repeatable() -> None:
    register()
    register()
    assert get_model("kvbits") is KVBitsLM


def test_the_command_line_says_in_one_line_what_is_wrong(
    path: str, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["lm_eval", "--model", "kvbits", "--model_args", f"pretrained={path},kv_cache_dtype=int7"]
    monkeypatch.setattr(sys, "argv", [*command, "--tasks", "choices", "--include_path", str(tasks)])
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: unknown KV cache dtype 'int7'")


def test_wrong_arguments_are_named(path: str) -> None:
    with pytest.raises(ConfigError, match="'colour', which --model kvbits does not know"):
        KVBitsLM(path, colour="red")
    with pytest.raises(ConfigError, match="--batch_size is 'big'"):
        KVBitsLM(path, batch_size="big")


def test_generation_options() -> None:
    greedy = Generation.of({"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}, 100)
    assert (greedy.until, greedy.max_tokens, greedy.params) == (("\n",), 5, {"temperature": 0.0})
    sampled = Generation.of({"do_sample": True, "top_p": 0.9}, 100)
    assert (sampled.max_tokens, sampled.params) == (100, {"temperature": 1.0, "top_p": 0.9})
    assert Generation.of({"until": ["a", "b"]}, 7).cut("xx b a </s>", "</s>") == "xx "
    with pytest.raises(RequestError, match="'num_beams'; kvbits knows"):
        Generation.of({"num_beams": 4}, 100)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvbits\[lm-eval\]'"):
        register()


def test_importing_the_module_for_task_files_registers_nothing() -> None:
    code = (
        "import kvbits.lm_eval.task as task, lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert 'kvbits' not in model_registry\n"
        "assert task.unchanged([1]) == [1] and 'kvbits' in model_registry"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no 'other'"):
        task_module.other  # noqa: B018


def test_the_example_runs(path: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), path, "--dtype", "int4"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "|capitals|" in done.stdout
