"""Calibrating and evaluating on another device, as far as a machine without one can tell.

Fake tensors have a device and no data, and refuse operations on tensors of two devices. Nothing here ran on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.command import complaint
from helpers.tiny import tiny_model, tiny_tokenizer

from kvbits.evaluation import compare
from kvbits.evaluation import laboratory as laboratories
from kvbits.evaluation.compare import SideBySide
from kvbits.evaluation.laboratory import Laboratory
from kvbits.evaluation.resume import ResumeCache
from kvbits.models.load import wrap

FAKE = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM
from helpers.tiny import tiny_config
from kvbits.attention import IMPLEMENTATION
from kvbits.calibration.collect import _window
from kvbits.calibration.layerwise import Layers
from kvbits.models import LoadedModel
from kvbits.models.geometry import geometry_of
from kvbits.models.load import register

_setup_privateuseone_for_python_backend("elsewhere")
register()
for family in sys.argv[1:]:
    config = tiny_config(family)
    config._experts_implementation = "batched_mm"  # shapes do not depend on the data
    geometry = geometry_of(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, own in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(own.shape, device="elsewhere")))
            for name, own in list(module.named_buffers(recurse=False)):
                module._buffers[name] = torch.empty(own.shape, dtype=own.dtype, device="elsewhere")
        loaded = LoadedModel(model, None, geometry, "fake", "0")
        assert loaded.device.type == "elsewhere"
        found = _window(Layers(loaded), list(range(10)) * 20, torch.Generator(), lambda share: None)
        assert {x.device.type for x in found.values()} == {"cpu"}
        print(family, len(found))
"""


def test_gradients_stay_on_the_model_s_device() -> None:
    families = ["llama", "qwen2", "gemma2", "gemma3_text", "gpt_oss"]
    command = [sys.executable, "-c", FAKE, *families]
    where = {"PYTHONPATH": str(Path(__file__).parent), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=where)
    assert done.stdout.splitlines() == [f"{family} 16" for family in families], done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["evaluate", "calibrate", "advise"])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_read(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    own = {
        "evaluate": ("--kv-cache-dtype", "int4"),
        "calibrate": ("--bits", 5, "-o", tmp_path / "policy"),
        "advise": ("--memory", "1GiB", "--context", 512),
    }[command]
    for device, said in (
        ("cuda", "the device 'cuda' cannot be used here: "),
        ("meta", "the model is on 'meta'; kvbits has kernels for cpu, cuda, xpu"),
    ):
        assert said in complaint(capsys, command, "no-such-model", "--text", text, "--device", device, *own)


def test_kernels_are_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrap(tiny_model("llama", head_dim=32), tiny_tokenizer(), "tiny")
    policies = [loaded.policy("int4")]
    given: list[object] = []
    monkeypatch.setattr(compare, "engine_for", lambda *args, **_: given.append(args[-1]))
    SideBySide(loaded, policies, 256)
    assert given == [None, None]  # an engine then goes by the model's device
    asked: list[str] = []
    monkeypatch.setattr(laboratories, "default_backend", lambda device: asked.append(device))
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0), fingerprint="0", weights="auto")
    laboratory = Laboratory(elsewhere, policies, ResumeCache(), lambda *_: None)  # type: ignore[arg-type]
    laboratory._backend()
    assert asked == ["cuda:0"]


def test_parts_of_another_device_are_not_taken_for_this_one_s() -> None:
    loaded = wrap(tiny_model("llama", head_dim=32), tiny_tokenizer(), "tiny")
    policy = loaded.policy("int4")
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0), fingerprint=loaded.fingerprint, weights="auto")
    keys = {
        Laboratory(model, [policy], ResumeCache(), lambda *_: None)._key("fidelity", policy, 1)  # type: ignore[arg-type]
        for model in (loaded, elsewhere)
    }
    assert len(keys) == 2
    assert Laboratory._arithmetic(elsewhere, "float32") == "float32, weights auto, on cuda"  # type: ignore[arg-type]
