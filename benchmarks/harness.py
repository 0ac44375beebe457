"""What every benchmark shares: timing, memory, ceilings, who takes part, and a record of what it ran on.

A benchmark is a list of cases. In each, a task is given to every provider on the same inputs: its result is held
against float64, then it takes turns with the task's ceiling, the least that anyone has to do, so that both
see the GPU at the same clock. What a provider did becomes a record, a dict of plain values:

    case       the case's fields                     ms, ms_p10, ms_p90  median and quantiles
    task       what was asked for                    ceiling_ms          the ceiling's median in the same turns
    provider   who did it, and whether it is "ours"  errors              against float64, by name
    ceiling    what the ceiling does                 wrong, skipped      why there is nothing to compare
    peak_bytes beyond what was there before          wall_ms             of a call from Python
    columns    more cells of a table, by their heads
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from grpo_fast.version import commit

Record = dict[str, Any]

#: Where the inputs lie. On the CPU the benchmarks of a GPU's kernels run only to be tested.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

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


# Who takes part, in what ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """An implementation of a task.

    Attributes:
        name: As the tables show it.
        run: From the case's inputs to the result.
        ours: Whether it is grpo_fast's.
        overwrites: It overwrites its inputs, which are restored before each run.
        comparable: It computes what the task asks for, so that its result can be held against the truth.
        bytes_of: What it needs in bytes, of a case, if that may be more than there is.
        only_in: The one case it takes part in, where it takes long; None for all.
    """

    name: str
    run: Callable[[Any], Any]
    ours: bool = False
    overwrites: bool = False
    comparable: bool = True
    bytes_of: Callable[[Any], float] | None = None
    only_in: Any = None


@dataclass(frozen=True)
class Task:
    """What is asked of every provider over the same inputs.

    Attributes:
        name: As the tables show it.
        ceiling: What the ceiling does, in a word or two.
        at_most: By the name of an error, from where on a result is not the same but wrong.
    """

    name: str
    ceiling: str
    providers: tuple[Provider, ...]
    at_most: dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """A list of cases, and how one is measured.

    Attributes:
        quick: The cases of --quick; none if all take long.
        headline: The case that a report shows in full.
        measure: (timer, case, whether a provider takes part) to the case's records.
        notes: Markdown above the tables of a report: what was measured, and how to read it.
        axes: Fields of the case to draw times and memory against.
        columns: More cells of a table, by their heads, that follow from a record with a time.
        command: What runs it, if not ``grpo-fast bench NAME``.
    """

    name: str
    summary: str
    notes: str
    cases: tuple[Any, ...]
    quick: tuple[Any, ...]
    headline: Any
    measure: Callable[[Timer, Any, Callable[[Provider], bool]], list[Record]]
    title: Callable[[dict[str, Any]], str]
    axes: tuple[str, ...] = ()
    columns: Callable[[Record], dict[str, str]] | None = None
    device: str = "cuda"
    command: str = ""

    def with_columns(self, records: Sequence[Record]) -> list[Record]:
        """The records, with the cells that follow from them."""
        if self.columns is None:
            return list(records)
        return [r if "ms" not in r else r | {"columns": self.columns(r) | r.get("columns", {})} for r in records]


# Time -------------------------------------------------------------------------------------------------------------


class Timer:
    """Medians of times in milliseconds, of functions that take turns.

    On a GPU between device events, each run with a cold L2 cache, and with the host ahead of the GPU, as it is in
    training: what it spends on launches is in the time only after it waited for the GPU; ``wall`` has all of it. On a
    CPU by the clock.
    """

    LEAD = 6_000_000  # GPU cycles, 3 ms or more

    def __init__(self, runs: int = 20, warmup: int = 3, device: str = "cuda") -> None:
        self.runs, self.warmup, self.device = runs, warmup, device
        if device == "cuda":
            self._cache = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # larger than any L2

    def __call__(self, fn: Callable[[], Any]) -> dict[str, float]:
        """Median, and 10 % and 90 % quantiles."""
        return self.interleaved(fn)[0]

    def interleaved(self, *fns: Callable[[], Any], before: Callable[[], Any] | None = None) -> list[dict[str, float]]:
        """The same of each function; ``before`` runs ahead of each run, outside the time."""
        restore = before or (lambda: None)
        for _ in range(self.warmup):
            for fn in fns:
                restore()
                fn()
        self.synchronize()
        if self.device != "cuda":
            times = [[self._clocked(fn, restore) for fn in fns] for _ in range(self.runs)]
            return [_quantiles(list(own)) for own in zip(*times, strict=True)]
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in fns]
        for _ in range(self.runs):
            for fn, own in zip(fns, events, strict=True):
                restore()
                self._cache.zero_()
                torch.cuda._sleep(self.LEAD)
                start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start_event.record()
                fn()
                end_event.record()
                own.append((start_event, end_event))
        torch.cuda.synchronize()
        return [_quantiles([start.elapsed_time(end) for start, end in own]) for own in events]

    def wall(self, fn: Callable[[], Any]) -> float:
        """Milliseconds a call takes as the caller sees it, host and GPU."""
        for _ in range(self.warmup):
            fn()
        self.synchronize()
        start = perf_counter()
        for _ in range(self.runs):
            fn()
        self.synchronize()
        return (perf_counter() - start) / self.runs * 1e3

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _clocked(fn: Callable[[], Any], before: Callable[[], Any]) -> float:
        before()
        start = perf_counter()
        fn()
        return (perf_counter() - start) * 1e3


def _quantiles(times: list[float]) -> dict[str, float]:
    low, median, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    )
    return {"ms": median, "ms_p10": low, "ms_p90": high}


def fastest(timer: Timer, fns: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The fastest of several ways to do the same."""
    times = [found["ms"] for found in timer.interleaved(*fns)]
    return fns[times.index(min(times))]


# A task, given to all ---------------------------------------------------------------------------------------------


def run_task(
    timer: Timer,
    case: Any,
    task: Task,
    x: Any,
    *,
    ceiling: Callable[[], Any],
    takes_part: Callable[[Provider], bool],
    errors: Callable[[Any], dict[str, float]] | None = None,
    restore: Callable[[], Any] | None = None,
) -> list[Record]:
    """A record of every provider.

    Args:
        x: The inputs of the case.
        ceiling: Takes turns with every provider.
        errors: From a result to how far it is from the truth, by name; None where there is no truth.
        restore: Makes the inputs what they were.
    """
    records: list[Record] = []
    for provider in task.providers:
        if not takes_part(provider) or (provider.only_in is not None and provider.only_in != case):
            continue
        record: Record = {"case": asdict(case), "task": task.name, "provider": provider.name, "ours": provider.ours}
        record["ceiling"] = task.ceiling
        if provider.bytes_of is not None and provider.bytes_of(case) > available_bytes():
            record["skipped"] = f"needs {provider.bytes_of(case) / 2**30:.0f} GiB"
        else:
            record |= attempt(lambda: _measure(timer, task, provider, x, ceiling, errors, restore))  # noqa: B023
        if restore is not None:
            restore()
        records.append(record)
    return records


def _measure(
    timer: Timer,
    task: Task,
    provider: Provider,
    x: Any,
    ceiling: Callable[[], Any],
    errors: Callable[[Any], dict[str, float]] | None,
    restore: Callable[[], Any] | None,
) -> Record:
    def run() -> Any:
        return provider.run(x)

    record: Record = {}
    if errors is not None and provider.comparable:
        record["errors"] = errors(run())
        wrong = [name for name, value in record["errors"].items() if not value <= task.at_most.get(name, math.inf)]
        if wrong:
            record["wrong"] = ", ".join(f"{name} off by {record['errors'][name]:.1e}" for name in wrong)
        if restore is not None:
            restore()
    if timer.device == "cuda":
        record["peak_bytes"] = peak_memory(run)
    alone, whole = timer.interleaved(ceiling, run, before=restore if provider.overwrites else None)
    return record | whole | {"ceiling_ms": alone["ms"]}


def attempt(measure: Callable[[], Record]) -> Record:
    """What ``measure`` found, or under "skipped" why it found nothing."""
    try:
        return measure()
    except ImportError as e:
        return {"skipped": f"not installed: {e.name or str(e).splitlines()[0][:120]}"}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"skipped": "out of memory"}
    except Exception as e:  # a failure is a result too
        return {"skipped": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"}


# Memory, and what it ran on ---------------------------------------------------------------------------------------


def available_bytes() -> float:
    """What can be had on the GPU; infinite on a CPU, whose memory nothing here fills."""
    if not torch.cuda.is_available():
        return math.inf
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 0.95 * (torch.cuda.mem_get_info()[0] + unused)


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


def ways_to_read(x: Tensor) -> list[Callable[[], Any]]:
    """Torch's own ways to read all of ``x`` once; which is fastest depends on its shape."""
    flat = x.view(torch.int64) if x.size(-1) * x.element_size() % 8 == 0 else x
    return [lambda: torch.amax(x, -1), lambda: flat.max(), lambda: flat.sum()]


def ways_to_copy(x: Tensor, to: Tensor) -> list[Callable[[], Any]]:
    """Torch's own ways to copy ``x``, in one piece: by the driver, and by a kernel."""
    return [lambda: to.copy_(x), lambda: torch.mul(x, 1, out=to)]


def environment() -> dict[str, str]:
    """GPU or CPU, versions, date and commit."""
    found = {"cpu": f"{os.cpu_count()} cores"}
    if torch.cuda.is_available():
        driver = _printed(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found = {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "date": datetime.date.today().isoformat(), "commit": commit()}


def _printed(command: list[str]) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        printed = ""
    return (printed.strip().splitlines() or ["unknown"])[0]
