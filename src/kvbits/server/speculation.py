"""What guessing tokens brings, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from kvbits.engine.speculation import SpeculationStats


def speculation_metrics(stats: SpeculationStats, model: str) -> Iterator[Metric]:
    """Counters of guesses, and our own of guesses that were withheld."""
    counters = {
        "vllm:spec_decode_num_drafts": ("Guesses: one a sequence and step.", stats.drafts),
        "vllm:spec_decode_num_draft_tokens": ("Tokens guessed.", stats.draft_tokens),
        "vllm:spec_decode_num_accepted_tokens": ("Guessed tokens that were kept.", stats.accepted_tokens),
        "kvbits:spec_decode_withheld": ("Steps of sequences without a guess, because it would lose.", stats.withheld),
        "kvbits:spec_decode_suspended": ("Sequences set aside because their guesses failed.", stats.suspended),
    }
    for name, (text, value) in counters.items():
        metric = CounterMetricFamily(name, text, labels=["model_name"])
        metric.add_metric([model], value)
        yield metric
    places = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Guesses whose token at this position was kept.",
        labels=["model_name", "position"],
    )
    for position, count in enumerate(list(stats.accepted_at)):
        places.add_metric([model, str(position)], count)
    yield places
