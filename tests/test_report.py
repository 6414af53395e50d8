"""The report: what it takes files for, what it shows of them, what it recommends, and that it needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvbits.cli.main import run
from kvbits.errors import ConfigError
from kvbits.report.advice import advise
from kvbits.report.figures import draw_all, pareto
from kvbits.report.gather import gather


def quality(dtype: str, bits: float, kl: float, **more: Any) -> dict[str, Any]:
    return {
        "dtype": dtype, "bits_per_element": bits, "effective_bits_per_element": bits + 0.5, "perplexity": 20 + kl,
        "perplexity_16bit": 20.0, "kl_mean": kl, "kl_p99": 9 * kl, "kl_max": 30 * kl, "top1_agreement": 1 - kl,
        "windows": 2, "context": 2048, "tokens": 2046, **more,
    }  # fmt: skip


QUALITY = {
    "model": "smollm2-135m",
    "results": [
        quality("bf16", 16, 0.0, verdict="no measurable loss"),
        quality(
            "int8", 8.25, 0.0002, verdict="no measurable loss", kl_interval={"low": 0.0001, "high": 0.0003},
            by_position=[{"begin": 0, "end": 1024, "kl_mean": 1e-4}, {"begin": 1024, "end": 2048, "kl_mean": 2e-4}],
            by_layer={"layers": [{"layer": i, "error": 0.01 * (i + 1)} for i in range(3)]},
        ),
        quality("int5", 5.5, 0.004, verdict="small loss"),
        quality("int4", 4.5, 0.011, verdict="small loss"),
        quality("int2", 2.5, 0.4, verdict="do not use"),
    ],
}  # fmt: skip


def scheme(dtype: str, bits: float, sessions: int) -> dict[str, Any]:
    at = {
        "context": 4096,
        "sessions": sessions,
        "running": sessions,
        "gain_over_16bit": 16 / bits,
        "fills_first": "memory",
    }
    return {
        "dtype": dtype, "bits_per_element": bits, "kv_bytes_per_token": 1440 * bits, "longest_context": 8192,
        "contexts": [at], "range": [{"context": 1024, "sessions": 4 * sessions}, at],
    }  # fmt: skip


PLAN = {
    "model": "smollm2-135m", "memory_bytes": 1 << 30, "weights_bytes": 1 << 28, "workspace_bytes": 1 << 26,
    "cache_bytes": (1 << 30) - (1 << 28) - (1 << 26),
    "schemes": [scheme(*row) for row in (("bf16", 16, 8), ("int8", 8.25, 15), ("int5", 5.5, 22), ("int4", 4.5, 27))],
}  # fmt: skip
SPEED = {
    "model": "smollm2-135m",
    "results": [
        {"dtype": d, "context": 4096, "batch": 8, "decode_tokens_per_s": t, "prefill_tokens_per_s": 700.0,
         "decode_step_ms": 8000 / t, "kv_bytes_per_token": 100.0}
        for d, t in (("bf16", 40.0), ("int8", 80.0), ("int4", 130.0))
    ],
}  # fmt: skip
POLICY = {
    "format": "kvbits-policy", "version": 2, "model": {"name": "smollm2-135m", "fingerprint": "0"},
    "layers": ["int4", "int8/int4", "int4"], "sink": None,
    "measured": {"sensitivity": {"int8": {"key": [1e-6, 2e-6, None], "value": [1e-6] * 3},
                                 "int4": {"key": [1e-3, 8e-3, 1e-3], "value": [3e-4] * 3}}},
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, document in (("quality", QUALITY), ("plan", PLAN), ("speed", SPEED)):
        found[name] = tmp_path / f"{name}.json"
        found[name].write_text(json.dumps(document))
    found["policy"] = tmp_path / "mine"
    found["policy"].mkdir()
    (found["policy"] / "policy.json").write_text(json.dumps(POLICY))
    return found


@pytest.mark.parametrize(
    ("sessions", "dtype"),
    [(1, "int8"), (15, "int8"), (16, "int5"), (22, "int5"), (23, "int4"), (27, "int4"), (28, None)],
)
def test_the_recommendation_follows_the_rule(files: dict[str, Path], sessions: int, dtype: str | None) -> None:
    """No loss first, then the least; a dtype that must not be used never; nothing where nothing fits."""
    advice = advise(gather(files.values()), sessions, None)
    assert advice.dtype == dtype
    if dtype is None:
        assert advice.reasons[0] == "No usable dtype holds 28 sessions of 4,096 tokens."
    else:
        text = " ".join(advice.reasons)
        assert f"{sessions:,} {'was' if sessions == 1 else 'were'} asked for" in text
        assert "Rule: " in text
    # int2 was evaluated, not planned
    assert any("int2" in line for line in advice.missing)


def test_a_policy_is_the_same_one_in_every_result_wherever_it_lay(tmp_path: Path) -> None:
    """``evaluate`` writes the path, ``plan`` the directory's name; the better policy must win over int4."""
    best = quality("policy:somewhere/else/tuned", 4.6, 0.001, verdict="small loss")
    evaluated, planned = tmp_path / "evaluated.json", tmp_path / "planned.json"
    evaluated.write_text(json.dumps({**QUALITY, "results": [*QUALITY["results"], best]}))
    planned.write_text(json.dumps({**PLAN, "schemes": [*PLAN["schemes"], scheme("tuned", 4.6, 26)]}))
    advice = advise(gather([evaluated, planned]), 25, None)
    assert advice.dtype == "tuned"
    assert "somewhere" not in " ".join((*advice.reasons, *advice.missing))


def test_without_a_plan_or_speeds_it_says_so(files: dict[str, Path]) -> None:
    advice = advise(gather([files["quality"]]), 1000, None)
    assert advice.dtype == "int8"
    assert len(advice.missing) == 2
    nothing = advise(gather([files["plan"]]), 1, None)
    assert nothing.dtype is None
    assert "evaluated" in nothing.reasons[0]


def test_a_reason_names_what_was_cheaper_and_why_not(files: dict[str, Path]) -> None:
    text = " ".join(advise(gather(files.values()), 1, None).reasons)
    assert "int4 has fewer bits (4.50), but: small loss (KL 0.011)" in text
    assert "int2 has fewer bits (2.50), but: do not use" in text
    assert "1.9 times what 16 bit holds (8)" in text


def test_the_front_leaves_out_what_is_beaten(files: dict[str, Path], tmp_path: Path) -> None:
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps({"model": "smollm2-135m", "results": [quality("nf4", 4.75, 0.02)]}))
    figure = pareto(gather([files["quality"], worse]))
    assert figure is not None
    assert list(figure.data[0].x) == [2.5, 4.5, 5.5, 8.25]
    assert {trace.name for trace in figure.data[1:]} == {"int8", "int5", "int4", "int2", "nf4"}


def test_every_plot_that_the_results_allow(files: dict[str, Path]) -> None:
    drawn = {anchor for anchor, _, _ in draw_all(gather(files.values()))}
    assert drawn == {"pareto", "sensitivity", "policy", "layers", "position", "capacity", "speed"}
    assert {anchor for anchor, _, _ in draw_all(gather([files["speed"]]))} == {"speed"}


def test_the_page_needs_nothing_else_and_escapes(files: dict[str, Path], tmp_path: Path) -> None:
    evil = {**SPEED, "results": [{**SPEED["results"][0], "dtype": "<script>alert(1)</script>"}]}
    files["speed"].write_text(json.dumps(evil))
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as caught:
        run(["report", *map(str, files.values()), "--sessions", "16", "-o", str(page)])
    assert caught.value.code == 0
    html = page.read_text()
    assert "<strong>Use int5</strong>" in html
    body = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", body)
    assert not re.findall(r"<(?:link|img|iframe)\b", body)
    assert "<script>alert(1)" not in html
    for text in ("8.25", "+0.02 %", "40.0", "Capacity: 1.00 GiB"):
        assert text in body


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON file"),
        ("[]", "no JSON object"),
        ("{}", "holds no results"),
        ('{"results": []}', "holds no results"),
        ("[" * 9000, "no JSON file"),
        ('{"results": [{"kl_mean": 0.1}]}', "damaged: 'dtype' is no text"),
        ('{"results": [{"dtype": "int4", "kl_mean": null}]}', "damaged: 'bits_per_element' is no number"),
        ('{"results": [{"dtype": "int4", "decode_tokens_per_s": 1}]}', "damaged: 'batch' is no number"),
        ('{"schemes": 3}', "damaged: 'memory_bytes' is no number"),
        (json.dumps({**PLAN, "schemes": [{}]}), "damaged: 'bits_per_element' is no number"),
        (json.dumps({**PLAN, "schemes": [3]}), "damaged: 'bits_per_element' is no number"),
        ('{"format": "kvbits-policy"}', "damaged: 'name' is no text"),
        ('{"format": "kvbits-policy", "model": {"name": "a"}, "layers": 3}', "the policy has no 'layers'"),
    ],
)
def test_files_that_are_no_results_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"x.json.*{words}"):
        gather([path])


def test_results_of_two_models_are_not_mixed(files: dict[str, Path]) -> None:
    files["plan"].write_text(json.dumps({**PLAN, "model": "llama-3.1-8b"}))
    with pytest.raises(ConfigError, match=r"different models: smollm2-135m .*llama-3\.1-8b"):
        gather(files.values())
    with pytest.raises(ConfigError, match="no results"):
        gather([])


def test_a_later_result_replaces_an_earlier_one(files: dict[str, Path], tmp_path: Path) -> None:
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps({"model": "SmolLM2-135M-Instruct", "results": [quality("int4", 4.5, 0.006)]}))
    found = gather([files["quality"], newer])
    assert [r["kl_mean"] for r in found.evaluated if r["dtype"] == "int4"] == [0.006]
    assert len(found.evaluated) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sessions", "0"), "'--sessions'"),
        (("--context", "77"), "planned: 4096"),
        (("-o", "/no/where.html"), "/no/"),
    ],
)
def test_mistakes_are_one_line(
    files: dict[str, Path], arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["report", str(files["plan"]), *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
