"""The command ``grpo-fast bench``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import (
    bench_distillation,
    bench_distributed,
    bench_fsdp,
    bench_linear,
    bench_logits,
    bench_reference,
    bench_rollout,
    bench_sparse,
    bench_trl_step,
)
from .bench_advantages import benchmark as advantages
from .compare import compare
from .harness import DEVICE, Benchmark, Record
from .measure import Chosen, measure_cases, show
from .report import load, write_report

HELP = """\
Time grpo_fast on this machine, beside every peer that is installed: pip install trl liger-kernel unsloth_zoo
cut-cross-entropy verl quack-kernels. Everyone gets the same inputs, and is held against float64 before the time is
taken. Without an NVIDIA GPU the reference path and a step of the training loop are timed on the CPU."""
EXAMPLES = """\
examples:
  grpo-fast bench --quick                            in a minute or two on a GPU
  grpo-fast bench --out results                      everything; JSON files into the folder results
  grpo-fast bench linear --only grpo_fast TRL        one benchmark, two providers
  grpo-fast bench --quick --compare results          what moved since
  grpo-fast bench --show results/*.json --report performance.md    tables and plots of earlier runs
"""


def benchmarks(device: str) -> dict[str, Benchmark]:
    """All that a machine with such a device runs, by name."""
    own = [bench_reference.BENCHMARK]
    if device == "cuda":
        of_ops = (bench_logits, bench_linear, bench_sparse, bench_distillation, bench_trl_step, bench_rollout)
        own = [module.BENCHMARK for module in of_ops]
    return {b.name: b for b in (*own, advantages(device))}


def known() -> dict[str, Benchmark]:
    """All there are, by name; those of several GPUs have a command of their own."""
    several = {b.name: b for b in (bench_distributed.BENCHMARK, bench_fsdp.BENCHMARK)}
    return {**benchmarks("cpu"), **benchmarks("cuda"), **several}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="BENCHMARK", help=f"{', '.join(known())} (default: all that can run)"
    )
    parser.add_argument("--quick", action="store_true", help="a case or a few of each, and fewer runs")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="providers by the names that the tables show")
    parser.add_argument(
        "--runs", type=int, help="timed runs of each; the median counts (default: 20, with --quick 5)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write BENCHMARK.json there, case by case")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="print what moved since the results in FOLDER")
    parser.add_argument("--show", type=Path, nargs="+", metavar="JSON", help="measure nothing: show earlier results")
    parser.add_argument(
        "--report", type=Path, metavar="PAGE.md", help="with --show: write a page, and plots beside it"
    )


def run(options: dict[str, Any], command: str) -> None:
    """Run the command.

    Raises:
        ValueError: An option is wrong; the message names it.
    """
    if options["report"] is not None and options["show"] is None:
        raise ValueError("report: got one without --show, want the results that it is made of")
    runs = options["runs"] if options["runs"] is not None else 5 if options["quick"] else 20
    if runs < 2:
        raise ValueError(f"runs: got {runs}, want at least 2")
    if options["show"] is not None:
        _show(options["show"], options["report"])
        return
    available = benchmarks(DEVICE)
    unknown = [name for name in options["names"] if name not in known()]
    if unknown:
        raise ValueError(f"benchmark: got {unknown[0]!r}, want {', '.join(known())}")
    unable = [name for name in options["names"] if name not in available]
    if unable:
        device = "the CPU" if DEVICE == "cuda" else "an NVIDIA GPU"
        raise ValueError(f"benchmark: {unable[0]} needs {known()[unable[0]].command or device}")
    names = options["names"] or [name for name, b in available.items() if b.quick or not options["quick"]]
    slow = [name for name in names if options["quick"] and not available[name].quick]
    if slow:
        raise ValueError(f"quick: got it for {slow[0]}, which has no quick case")
    earlier = {}
    if options["compare"] is not None:
        earlier = {file.stem: load(file)["records"] for file in sorted(options["compare"].glob("*.json"))}
        if not earlier:
            raise ValueError(f"compare: {options['compare']} holds no results")
    if DEVICE == "cpu":
        print("No NVIDIA GPU: timing the reference path and the training loop on the CPU.\n")
    chosen = Chosen(options["only"])
    for benchmark in (available[name] for name in names):
        records = measure_cases(benchmark, options["quick"], chosen, runs, options["out"])
        if benchmark.name in earlier:
            _print_moves(benchmark, earlier[benchmark.name], records)
    if unmet := chosen.unmet():
        raise ValueError(f"only: got {', '.join(unmet)}, want among {', '.join(sorted(chosen.seen))}")


def _print_moves(benchmark: Benchmark, old: Sequence[Record], new: Sequence[Record]) -> None:
    moves = compare(list(old), list(new))
    print(f"{benchmark.name}: {len(moves)} moved since" if moves else f"{benchmark.name}: nothing moved beyond noise")
    for move in moves:
        direction = "worse" if move.worse else "better"
        place = f"{move.task}, {benchmark.title(dict(move.case))}"
        print(f"  {direction}: {move.what} of {move.provider}, {place}: {move.before:.4g} -> {move.after:.4g}")


def _show(files: Sequence[Path], page: Path | None) -> None:
    from rich.console import Console

    if page is not None:
        write_report(known(), files, page)
        print(f"{page} is written")
        return
    for content in map(load, files):
        show(Console(), known()[content["benchmark"]], content["records"])
