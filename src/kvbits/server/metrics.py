"""What Prometheus reads: the names of vLLM's dashboards for what both engines have, our own for the quantized cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvbits.auto.loss import Loss
from kvbits.codecs import PoolLayout
from kvbits.config import PAGE_TOKENS
from kvbits.pages import TierStats
from kvbits.server.speculation import speculation_metrics
from kvbits.server.worker import EngineWorker


class EngineCollector(Collector):
    """Turns the worker's snapshot into metrics when it is asked; costs the engine nothing."""

    def __init__(self, worker: EngineWorker, model: str, loss: Loss | None = None) -> None:
        self._worker = worker
        self._model = model
        self._loss = loss

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._worker.snapshot
        load, pool, stats = snapshot.load, snapshot.pool, snapshot.stats
        yield self._gauge("num_requests_running", "Sequences that run.", load.running)
        yield self._gauge("num_requests_waiting", "Sequences that wait.", load.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the pool that running sequences hold, 0 to 1.", load.usage)
        yield self._counter("prompt_tokens", "Prompt tokens.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Generated tokens.", stats.generated_tokens)
        yield self._counter("num_preemptions", "Sequences whose pages were taken for others.", stats.preemptions)
        yield self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", pool.queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", pool.hits)
        if self._worker.engine.speculator is not None:
            yield from speculation_metrics(stats.speculation, self._model)
        yield self._config()
        yield from self._own()

    def _config(self) -> Metric:
        engine = self._worker.engine
        labels = {
            "model_name": self._model,
            "block_size": str(PAGE_TOKENS),
            "cache_dtype": engine.pool.policy.name,
            "enable_prefix_caching": str(engine.config.enable_prefix_caching),
            "num_gpu_blocks": "0",
            "num_cpu_blocks": str(engine.pool.num_frames),
            "kv_cache_memory_bytes": str(engine.config.kv_cache_memory),
            "max_num_seqs": str(engine.config.max_num_seqs),
            "max_num_batched_tokens": str(engine.config.max_num_batched_tokens),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "How the cache is set up.", labels=list(labels))
        info.add_metric(list(labels.values()), 1)
        return info

    def _own(self) -> Iterator[Metric]:
        pool, stats = self._worker.snapshot.pool, self._worker.snapshot.stats
        held = self._worker.engine.pool
        frames = GaugeMetricFamily("kvbits:pool_frames", "Frames by what they hold.", labels=["model_name", "state"])
        for state in ("free", "open", "sealed", "shared", "cached"):
            frames.add_metric([self._model, state], getattr(pool, state))
        yield frames
        if pool.states is not None:
            slots = GaugeMetricFamily(
                "kvbits:state_slots", "Slots of recurrent layers' states by use.", labels=["model_name", "use"]
            )
            for use, count in asdict(pool.states).items():
                slots.add_metric([self._model, use], count)
            yield slots
        layers = GaugeMetricFamily(
            "kvbits:kv_bytes",
            "Bytes of sealed pages in use or cached, by layer and dtype.",
            labels=["model_name", "layer", "dtype"],
        )
        for index, place in enumerate(held.layout.sealed.places):
            size = place.scheme.layer_bytes(held.geometry.layers[index])
            layers.add_metric([self._model, str(index), place.scheme.name], pool.groups[place.frame] * size)
        yield layers
        yield self._gauge("bits_per_element", "Of a sealed page.", held.bits_per_element(), "kvbits:")
        yield self._gauge("bytes_per_token", "Of a sealed page.", held.bytes_per_token(), "kvbits:")
        if self._loss is not None:
            kl = "KL divergence to a 16-bit cache as measured on this model, nats a token."
            yield self._gauge("kv_cache_kl_nats", kl, self._loss.kl, "kvbits:")
            yield self._gauge("kv_cache_kl_tokens", "Tokens that it was measured on.", self._loss.tokens, "kvbits:")
        yield self._counter("cached_pages_evicted", "Cached pages given up.", pool.evictions, "kvbits:")
        if pool.tier is not None:
            yield from self._offload(pool.tier, held.layout)
        yield self._counter("engine_steps", "Steps of the engine.", stats.steps, "kvbits:")
        phases = CounterMetricFamily("kvbits:step_seconds", "Time in steps.", labels=["model_name", "phase"])
        for phase, seconds in stats.seconds.items():
            phases.add_metric([self._model, phase], seconds)
        yield phases

    def _offload(self, tier: TierStats, layout: PoolLayout) -> Iterator[Metric]:
        used, whole = layout.bytes_of(tier.used), layout.bytes_of(tier.slots)
        yield self._gauge("offload_bytes", "Bytes of pages in the offload tier.", used, "kvbits:")
        yield self._gauge("offload_capacity_bytes", "Bytes that the offload tier holds.", whole, "kvbits:")
        yield self._gauge("offload_pages", "Pages in the offload tier.", tier.pages, "kvbits:")
        yield self._gauge("offload_states", "States of recurrent layers in the offload tier.", tier.states, "kvbits:")
        yield self._gauge("offload_read_only", "1 after a failed write.", tier.read_only, "kvbits:")
        for name, text, value in (
            ("stored", "Pages written to the offload tier.", tier.stored),
            ("restored", "Pages brought back from the offload tier.", tier.restored),
            ("dropped", "Pages that made room in the offload tier.", tier.dropped),
            ("damaged", "Offloaded pages that failed their checksum or could not be read.", tier.damaged),
            ("failed_writes", "Pages that could not be written.", tier.failed_writes),
        ):
            yield self._counter(f"offload_{name}", text, value, "kvbits:")

    def _gauge(self, name: str, text: str, value: float, prefix: str = "vllm:") -> Metric:
        metric = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def _counter(self, name: str, text: str, value: float, prefix: str = "vllm:") -> Metric:
        metric = CounterMetricFamily(prefix + name, text, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric
