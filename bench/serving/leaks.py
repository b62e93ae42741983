"""What a server holds, sample by sample, and whether it grows."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil

from bench.serving.client import ask

RSS_BYTES = 32e6  # what allocators may keep over a run; bench.soak's bound
POOL_THREADS = 40  # a pool grows to its bound when it is first needed; anyio's is the largest
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
KV_BYTES = "mlx_gemma_mtp:kv_bytes_used"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
HELD = ("running", "waiting", "kv_bytes")


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment of the server. at: seconds of the monotonic clock; drafted, accepted: so far."""

    at: float
    running: float
    waiting: float
    kv_bytes: float
    fds: int
    threads: int
    rss_bytes: int
    drafted: float = 0.0
    accepted: float = 0.0


async def sample(port: int, pid: int) -> Sample:
    """Look at a server, from outside and in its metrics. Raises: ConnectionError, ValueError."""
    async with ask(port, "/metrics") as reply:
        metrics = read_metrics((await reply.read()).decode())
    process = psutil.Process(pid)
    with process.oneshot():
        return Sample(
            at=time.monotonic(),
            running=metric(metrics, RUNNING),
            waiting=metric(metrics, WAITING),
            kv_bytes=metric(metrics, KV_BYTES),
            fds=process.num_fds(),
            threads=process.num_threads(),
            rss_bytes=process.memory_info().rss,
            drafted=metric(metrics, DRAFTED),
            accepted=metric(metrics, ACCEPTED),
        )


def read_metrics(text: str) -> dict[str, float]:
    """Return Prometheus' text as sums by name, whatever the labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def metric(metrics: dict[str, float], name: str) -> float:
    """Return a metric. Raises: ValueError if the server does not have it."""
    if name not in metrics:
        raise ValueError(f"/metrics has no {name}")
    return metrics[name]


def grown(samples: list[Sample]) -> float:
    """Return by how many bytes resident memory grew over the samples, by the line through them."""
    if len(samples) < 3:
        return 0.0
    at = np.array([sample.at for sample in samples])
    slope = np.polyfit(at - at[0], [sample.rss_bytes for sample in samples], 1)[0]
    return float(slope * (at[-1] - at[0]))


def leaks(before: Sample, after: Sample, samples: list[Sample]) -> list[str]:
    """Say what a server holds too much of.

    before, after: idle, early in the run and at its end; samples: in between.
    """
    found = [
        f"{name}: {getattr(after, name):g} while nobody is served"
        for name in ("running", "waiting")
        if getattr(after, name)
    ]
    for name, more in (("kv_bytes", 0), ("fds", 0), ("threads", POOL_THREADS)):
        had, has = getattr(before, name), getattr(after, name)
        if has > had + more:
            found.append(f"{name}: {had:g} before, {has:g} after")
    growth = grown(samples)
    if growth > RSS_BYTES:
        found.append(
            f"resident memory grew by {growth / 1e6:.0f} MB, {RSS_BYTES / 1e6:.0f} allowed"
        )
    return found


def record(sample: Sample) -> dict[str, Any]:
    """Return a sample for JSON."""
    return {name: value for name, value in asdict(sample).items() if name != "at"}
