"""A benchmark, measured: who takes part, its records case by case, shown as they come and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_fast.train.files import write_json

from .harness import Benchmark, Provider, Record, Timer, environment
from .report import groups, header, row


class Chosen:
    """Whether a provider takes part: all do, or those of some names."""

    def __init__(self, only: Sequence[str] | None = None) -> None:
        self.only = only
        self.seen: set[str] = set()

    def __call__(self, provider: Provider) -> bool:
        self.seen.add(provider.name)
        return self.only is None or provider.name in self.only

    def unmet(self) -> list[str]:
        """The names that nobody had who was asked."""
        return [name for name in self.only or () if name not in self.seen]


def measure_cases(
    benchmark: Benchmark,
    quick: bool,
    takes_part: Callable[[Provider], bool],
    runs: int,
    out: Path | None,
    timer: Timer | None = None,
    quiet: bool = False,
) -> list[Record]:
    """Records of all cases, shown as they come, unless ``quiet``, and written to ``out``/NAME.json."""
    from rich.console import Console
    from rich.progress import track

    console = Console(quiet=quiet)
    timer = timer or Timer(runs, device=benchmark.device)
    where = environment()
    console.print(f"[bold]{benchmark.name}[/]: {benchmark.summary}", highlight=False)
    console.print(" ".join(f"{name} {value}" for name, value in where.items()), highlight=False)
    records: list[Record] = []
    for case in track(benchmark.quick if quick else benchmark.cases, benchmark.name, console=console, transient=True):
        new = benchmark.measure(timer, case, takes_part)
        show(console, benchmark, new)
        records += new
        if benchmark.device == "cuda":
            torch.cuda.empty_cache()
        if out is not None:
            content = {"benchmark": benchmark.name, "environment": where, "records": records}
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / f"{benchmark.name}.json", content)
    return records


def show(console: Any, benchmark: Benchmark, records: Sequence[Record]) -> None:
    from rich.table import Table

    for case, task, members in groups(benchmark.with_columns(records)):
        columns = header(members)
        table = Table(title=f"{task}, {benchmark.title(case)}", title_justify="left", title_style="bold")
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i == 0 else "right")
        best = min((r["ms"] for r in members if "ms" in r and "wrong" not in r), default=None)
        for record in members:
            table.add_row(*row(record, columns), style="green" if record.get("ms") == best else None)
        console.print(table)
