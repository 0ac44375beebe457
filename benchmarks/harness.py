"""What every benchmark here shares: timing, ceilings, peak memory, and a record of what it ran on."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = (
    "torch",
    "triton",
    "trl",
    "liger_kernel",
    "quack-kernels",
    "cut-cross-entropy",
    "verl",
    "unsloth_zoo",
    "transformers",
)


class Timer:
    """Medians of GPU times in milliseconds, between device events, each run with a cold L2 cache.

    The host runs ahead of the GPU, so what it spends before a launch is not in the time; see ``wall`` for that.
    """

    def __init__(self, runs: int = 20, warmup: int = 3) -> None:
        self.runs, self.warmup = runs, warmup
        self._cache = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # larger than any L2

    def __call__(self, fn: Callable[[], Any], before: Callable[[], Any] | None = None) -> dict[str, float]:
        """Median, and 10 % and 90 % quantiles, of ``fn``; ``before`` runs ahead of each run, outside the time."""
        return self.interleaved(fn, before=before)[0]

    def interleaved(self, *fns: Callable[[], Any], before: Callable[[], Any] | None = None) -> list[dict[str, float]]:
        """The same for several that take turns, so that all see the GPU at the same clock."""
        for _ in range(self.warmup):
            for fn in fns:
                if before is not None:
                    before()
                fn()
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # time for the host to get ahead
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in fns]
        for _ in range(self.runs):
            for fn, own in zip(fns, events, strict=True):
                if before is not None:
                    before()
                self._cache.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                fn()
                end.record()
                own.append((start, end))
        torch.cuda.synchronize()
        return [_quantiles([start.elapsed_time(end) for start, end in own]) for own in events]

    def wall(self, fn: Callable[[], Any]) -> float:
        """Milliseconds a call takes as the caller sees it, host and GPU."""
        import time

        for _ in range(self.warmup):
            fn()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.runs):
            fn()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.runs * 1e3


def _quantiles(times: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"ms": median, "ms_p10": low, "ms_p90": high}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``measure`` found, or under "skipped" why it found nothing."""
    try:
        return measure()
    except ImportError as e:
        return {"skipped": f"not installed: {e.name or e}"}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"skipped": "out of memory"}
    except Exception as e:  # a failure is a result too
        return {"skipped": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"}


def peak_memory(fn: Callable[[], Any]) -> int:
    """Bytes that ``fn`` allocates at its peak beyond what is there before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = fn()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def ceilings(timer: Timer, x: Tensor) -> dict[str, float]:
    """Milliseconds to copy ``x``, and to read it: the fastest of torch's own ways."""
    y = torch.empty_like(x)
    copy = timer(lambda: y.copy_(x))["ms"]
    flat = x.view(torch.int64) if x.size(-1) * x.element_size() % 8 == 0 else x
    reads = [timer(fn)["ms"] for fn in (lambda: torch.amax(x, -1), lambda: flat.max(), lambda: flat.sum())]
    return {"copy_ms": copy, "read_ms": min(reads)}


def environment() -> dict[str, str]:
    """GPU, versions, date and commit."""
    root = Path(__file__).resolve().parent.parent
    commit = os.environ.get("GRPO_FAST_COMMIT", "")  # for a copy without its history
    if not commit:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip().splitlines()[0] if driver.stdout.strip() else "unknown",
        "cuda": str(torch.version.cuda),
        **versions,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
