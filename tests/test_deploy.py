"""The files for containers and dashboards agree with the program: metrics, options, paths."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import typer
import yaml
from helpers.serving import MODEL, byte_model, running
from prometheus_client.parser import text_string_to_metric_families

from kvbits.auto.loss import Loss
from kvbits.cli.main import app
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.speculation import SpeculativeConfig

ROOT = Path(__file__).parents[1]


def expressions() -> list[str]:
    board = json.loads((ROOT / "deploy/grafana/kvbits.json").read_text())
    queries = [item["query"] for item in board["templating"]["list"] if item["type"] == "query"]
    return [*queries, *(target["expr"] for panel in board["panels"] for target in panel["targets"])]


def test_the_dashboard_names_metrics_of_a_running_server() -> None:
    named = set(re.findall(r"(?:vllm|kvbits):\w+", " ".join(expressions())))
    config = EngineConfig(kv_cache_memory=4 << 20, kv_offload_size=1 << 20)
    engine = Engine(byte_model(), config, speculative=SpeculativeConfig.of("ngram"))
    loss = Loss("int8", 0.0001, 0.0001, 0.0001, 64, 64, "", "float32")
    with running(engine, loss) as server:
        body = {"model": MODEL, "prompt": "abc", "max_tokens": 3}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        served = {sample.name for family in families for sample in family.samples}
    assert named - served == set()
    assert len(named) > 25
    # what the server measures is on the dashboard, but for the parts that histograms and counters have besides
    series = {re.sub(r"_(count|sum|created)$", "", name) for name in served if name.startswith(("vllm:", "kvbits:"))}
    unseen = {name for name in series if not any(n in named for n in (name, f"{name}_bucket", f"{name}_total"))}
    assert unseen <= {"vllm:cache_config_info", "vllm:spec_decode_num_accepted_tokens_per_pos_total"}, unseen


def test_every_label_of_the_dashboard_is_on_its_metric() -> None:
    for text in expressions():
        for labels in re.findall(r"\{([^}]*)\}", text):
            assert labels == 'model_name=~"$model"'


def test_compose_and_image_give_options_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "compose.yml").read_text())
    words = compose["services"]["kvbits"]["command"].split()
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists(), source
    targets = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert targets == [{"targets": ["kvbits:8000"]}]
    for name in (ROOT / ".dockerignore").read_text().split():
        if name.startswith("!"):
            assert (ROOT / name[1:]).exists(), name
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    assert {f"!{name}" for line in copied for name in line.split()} <= set((ROOT / ".dockerignore").read_text().split())
