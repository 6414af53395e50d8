"""kvbits' codecs as a secondary tier of vLLM's offload (``vllm/v1/kv_offload/tiering/base.py``).

Chunks of 16-bit blocks that a GPU engine moved to host memory are kept in a policy's bits, in memory
(:class:`KvbitsTier`) or in files (:class:`KvbitsFileTier`). vLLM imports the class by ``module_path``; docs/vllm.md
has a configuration.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvbits.errors import ConfigError, KVBitsError, UnsupportedError
from kvbits.vllm.chunk_plan import ChunkPlan, positive
from kvbits.vllm.kept import Kept, KeptInFiles, KeptInMemory

log = logging.getLogger(__name__)


@dataclass
class _Job:
    """A job of vLLM's, chunk by chunk: each task returns the bytes it moved."""

    job: TransferJob
    tasks: dict[OffloadKey, Future[int]]
    begun: float = field(default_factory=time.monotonic)

    def done(self) -> bool:
        return all(task.done() for task in self.tasks.values())


class KvbitsTier(SecondaryTierManager):
    """Chunks in this process's memory, at most ``capacity_bytes`` of them, coded in ``threads`` threads.

    ``policy`` is what ``--kv-cache-dtype`` takes, or ``policy:DIR``; ``kv_heads`` and ``head_size`` are the model's.
    Raises ``ConfigError`` or ``UnsupportedError`` for what cannot work, when the engine starts.
    """

    medium: ClassVar[Medium | None] = Medium.CPU

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        policy: str,
        kv_heads: int,
        head_size: int,
        capacity_bytes: int,
        threads: int = 2,
        locality: str | None = None,
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if current_platform.is_rocm():
            raise UnsupportedError("kvbits' tier: keys lie otherwise in the blocks of vLLM's backends for ROCm")
        for name, value in (("capacity_bytes", capacity_bytes), ("threads", threads)):
            positive(name, value)
        self.locality = None if locality is None else Locality(locality)
        self._plan = ChunkPlan.of(offloading_spec.config, policy, kv_heads, head_size)
        if capacity_bytes < self._plan.chunk_bytes:
            raise ConfigError(
                f"'capacity_bytes' of kvbits' tier is {capacity_bytes}; one chunk takes {self._plan.chunk_bytes}"
            )
        self._kept: Kept = KeptInMemory(capacity_bytes)
        self._rows: Tensor | None = torch.from_numpy(np.asarray(primary_kv_view).view(np.uint8))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvbits-tier")
        self._jobs: list[_Job] = []
        self._coming: set[bytes] = set()

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        if key in self._kept:
            return LookupResult.HIT
        return LookupResult.RETRY if key in self._coming else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        new = {key: int(row) for key, row in _chunks(job_metadata) if not self._known(key)}
        self._coming.update(new)
        tasks = {key: self._pool.submit(self._store, key, row) for key, row in new.items()}
        self._jobs.append(_Job(job_metadata, tasks))

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._kept.touch(job_metadata.keys)
        tasks = {key: self._pool.submit(self._load, key, int(row)) for key, row in _chunks(job_metadata)}
        self._jobs.append(_Job(job_metadata, tasks))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        ended = [job.done() for job in self._jobs]
        found = [job for job, done in zip(self._jobs, ended, strict=True) if done]
        self._jobs = [job for job, done in zip(self._jobs, ended, strict=True) if not done]
        return [self._result(job) for job in found]

    def touch(self, keys: Any, req_context: Any) -> None:
        self._kept.touch(keys)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        wait([task for job in self._jobs for task in job.tasks.values()])

    def shutdown(self) -> None:
        self._pool.shutdown()
        self._rows = None  # vLLM unmaps its memory next

    def _known(self, key: bytes) -> bool:
        return key in self._kept or key in self._coming

    def _store(self, key: OffloadKey, row: int) -> int:
        assert self._rows is not None
        data = self._plan.encode(self._rows[row], get_offload_group_idx(key))
        self._kept.write(key, data)
        return len(data)

    def _load(self, key: OffloadKey, row: int) -> int:
        assert self._rows is not None
        data = self._kept.read(key)
        self._plan.decode(data, self._rows[row], get_offload_group_idx(key))
        return len(data)

    def _result(self, job: _Job) -> JobResult:
        sizes: dict[OffloadKey, int] = {}
        for key, task in job.tasks.items():
            error = task.exception()
            if error is None:
                sizes[key] = task.result()
            else:
                known = isinstance(error, (KVBitsError, OSError))
                log.warning("A chunk of the tier '%s' is lost: %s", self.tier_type, error, exc_info=not known and error)
        if job.job.is_promotion:
            for key in job.tasks.keys() - sizes.keys():
                self._kept.drop(key)
        else:
            self._coming.difference_update(job.tasks)
            for key, size in sizes.items():
                self._kept.add(key, size)
        return JobResult(
            job_id=job.job.job_id,
            success=len(sizes) == len(job.tasks),
            successful_keys=tuple(sizes) or None if job.job.is_promotion else None,
            transfer_time=time.monotonic() - job.begun,
            transfer_bytes=sum(sizes.values()),
        )


class KvbitsFileTier(KvbitsTier):
    """The same in files below ``root_dir``, which outlive the engine. One engine at a time uses a directory's files."""

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(self, *args: Any, root_dir: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kept = KeptInFiles(self._kept.capacity, Path(root_dir) / self._plan.directory)


def _chunks(job: TransferJob) -> Iterator[tuple[OffloadKey, Any]]:
    return zip(job.keys, job.chunk_ids, strict=True)
