"""From the records of runs to Markdown and plots: all that docs/performance.md says comes through here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_fast.train.files import write_file

from .harness import Benchmark, Record

HEAD = """\
# Performance

Every number on this page comes from a committed file of results, by

```
grpo-fast bench --show {files} --report {page}
```

and can be measured anew by the command above each section. Times are medians in milliseconds, on a GPU each with a
cold L2 cache; "x ceiling" is the time beside that of the least that anyone has to do, which took turns with it; "MiB"
is the peak of memory beyond inputs; a result marked "wrong" is too far from that of float64 to be compared. How the
kernels work, where their time goes and what was tried is in [kernels.md](kernels.md).
"""


def load(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: It is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict) or not {"benchmark", "environment", "records"} <= content.keys():
        raise ValueError(f"{path}: no results of grpo-fast bench")
    return content


# Rows of cells, for Markdown and for the terminal -----------------------------------------------------------------


def groups(records: Iterable[Record]) -> Iterable[tuple[dict[str, Any], str, list[Record]]]:
    """(case, task, its records) in the order of the records."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[json.dumps([record["case"], record["task"]])].append(record)
    for own in found.values():
        yield own[0]["case"], own[0]["task"], own


def header(records: Sequence[Record]) -> list[str]:
    """Columns of a table over these records."""
    names = dict.fromkeys(name for r in records for name in r.get("errors", {}))
    own = dict.fromkeys(name for r in records for name in r.get("columns", {}))
    return ["", "ms", f"x {records[0]['ceiling']}", "MiB", *own, *(f"{name} error" for name in names)]


def row(record: Record, columns: Sequence[str]) -> list[str]:
    """The cells of a record under ``header``'s columns."""
    if "skipped" in record:
        return [record["provider"], record["skipped"], *[""] * (len(columns) - 2)]
    if "tokens" in record:
        return [record["provider"], f"{record['tokens']:,} tokens", *[""] * (len(columns) - 2)]
    rest = dict(record.get("columns", {}))
    rest |= {f"{name} error": f"{value:.1e}" for name, value in record.get("errors", {}).items()}
    ratio = f"{record['ms'] / record['ceiling_ms']:.2f}" if "ceiling_ms" in record else ""
    return [
        record["provider"] + (" (wrong result)" if "wrong" in record else ""),
        f"{record['ms']:.3f}" if record["ms"] < 10 else f"{record['ms']:.1f}",
        ratio,
        f"{record['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in record else "",
        *(rest.get(name, "") for name in columns[4:]),
    ]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def _time(record: Record) -> str:
    """The cell of a record where it has only one."""
    return row(record, header([record]))[1] + (" (wrong)" if "wrong" in record else "")


def overview(benchmark: Benchmark, records: Sequence[Record]) -> str:
    """Milliseconds of everyone by case, a table a task."""
    tables = []
    for task in dict.fromkeys(r["task"] for r in records):
        own = [r for r in records if r["task"] == task]
        found = [r for r in own if {"ms", "tokens"} & r.keys()]
        providers = list(dict.fromkeys(r["provider"] for r in found or own))
        rows = []
        for case, _, members in groups(own):
            times = {r["provider"]: _time(r) for r in members if r in found}
            if not times:  # nobody could run it: the first says why
                times = {providers[0]: _time(members[0])}
            ceilings = [r["ceiling_ms"] for r in members if "ceiling_ms" in r]
            middle = f"{sorted(ceilings)[len(ceilings) // 2]:.3g}" if ceilings else ""
            rows.append([benchmark.title(case), *(times.get(name, "") for name in providers), middle])
        unit = "" if any("tokens" in r for r in own) else ", ms"
        tables.append(markdown_table([task + unit, *providers, f"({own[0]['ceiling']})"], rows))
    return "\n\n".join(tables)


def losses(benchmark: Benchmark, records: Sequence[Record]) -> list[str]:
    """Where a peer whose result is right is faster than the fastest of ours, or has room for more."""
    lines = []
    for case, task, members in groups(records):
        most = max((r["tokens"] for r in members if r["ours"] and "tokens" in r), default=None)
        lines += [
            f"- {task}, {benchmark.title(case)}: {r['provider']} has {r['tokens']:,} tokens, grpo_fast {most:,}."
            for r in members
            if most is not None and r.get("tokens", 0) > most
        ]
        ours = [r["ms"] for r in members if r["ours"] and "ms" in r and "wrong" not in r]
        for r in members:
            if r["ours"] or "ms" not in r or "wrong" in r or not ours or r["ms"] >= min(ours):
                continue
            errors = ", ".join(f"{name} error {value:.0e}" for name, value in r.get("errors", {}).items())
            lines.append(
                f"- {task}, {benchmark.title(case)}: {r['provider']} takes {r['ms']:.3g} ms "
                f"({errors or 'computes less'}), grpo_fast {min(ours):.3g}."
            )
    return lines


# The page ---------------------------------------------------------------------------------------------------------


def _of_headline(
    benchmark: Benchmark, records: Sequence[Record]
) -> Iterable[tuple[dict[str, Any], str, list[Record]]]:
    """The groups of the case that is shown in full; how many ranks there were is the machine's, not the case's."""
    headline = asdict(benchmark.headline)
    ranks = ({"ranks": r["case"]["ranks"]} if "ranks" in headline else {} for r in records)
    return groups(r for r, own in zip(records, ranks, strict=True) if {**headline, **own} == r["case"])


def write_report(benchmarks: dict[str, Benchmark], files: Sequence[Path], page: Path) -> None:
    """Write the page, and its plots into a folder of the page's name beside it.

    Raises:
        ValueError: A file holds no results.
    """
    shown = " ".join(relative(file, page) for file in files)
    parts = [HEAD.format(files=shown, page=page.name)]
    for file in files:
        content = load(file)
        benchmark = benchmarks[content["benchmark"]]
        records = benchmark.with_columns(content["records"])
        parts += [_section(benchmark, content, relative(file, page))]
        for name, picture in plots(benchmark, records, page.with_suffix("") / file.stem):
            parts.append(f"![{name}]({relative(picture, page)})")
        for case, task, members in _of_headline(benchmark, records):
            columns = header(members)
            parts += [
                f"**{task}**, {benchmark.title(case)}",
                markdown_table(columns, (row(r, columns) for r in members)),
            ]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_file(page, "\n\n".join(part.strip("\n") for part in parts) + "\n")


def relative(path: Path, page: Path) -> str:
    return path.resolve().relative_to(page.resolve().parent).as_posix()


def _section(benchmark: Benchmark, content: dict[str, Any], file: str) -> str:
    where = content["environment"]
    machine = where.get("gpu") or f"CPU, {where['cpu']}"
    versions = [
        f"{name} {value}" for name, value in where.items() if name not in ("gpu", "cpu") and value != "not installed"
    ]
    lost = losses(benchmark, content["records"]) or ["- Nowhere in this run."]
    return "\n".join(
        [
            f"## {benchmark.name}, {machine}: {benchmark.summary}",
            "",
            f"`{benchmark.command or f'grpo-fast bench {benchmark.name}'}`; {', '.join(versions)}.",
            f"All numbers, with quantiles: [{file}]({file}).",
            *(["", content["remark"]] if "remark" in content else []),
            "",
            benchmark.notes,
            "",
            overview(benchmark, content["records"]),
            "",
            "**Where a peer is faster than the fastest of ours:**",
            "",
            *lost,
        ]
    )


# Plots ------------------------------------------------------------------------------------------------------------


def plots(benchmark: Benchmark, records: Sequence[Record], stem: Path) -> list[tuple[str, Path]]:
    """(title, file) of each: time and memory along every axis, a figure a task; and how exact is how fast."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "grpo_fast", "svg.fonttype": "none"}  # the same records, the same bytes
    stem.parent.mkdir(parents=True, exist_ok=True)
    found = []
    axes = [(axis, _along(axis, records)) for axis in benchmark.axes]
    for task in dict.fromkeys(r["task"] for r in records):
        columns = [(axis, lines[task]) for axis, lines in axes if lines.get(task)]
        if not columns:
            continue
        kinds = [("time, ms", lambda r: r["ms"]), ("memory, MiB", lambda r: r.get("peak_bytes", 0) / 2**20)]
        figure = Figure(figsize=(4.2 * len(columns), 7.2), layout="constrained")
        for place, ((kind, value), (axis, lines)) in enumerate(((k, c) for k in kinds for c in columns), start=1):
            _draw(figure.add_subplot(len(kinds), len(columns), place), lines, axis, kind, value)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        name = task.replace(" ", "-").replace(",", "").replace("+", "and")
        file = stem.with_name(f"{stem.name}-{name}.svg")
        figure.savefig(file, metadata={"Date": None})
        found.append((f"{task}: time and memory", file))
    held = []
    for _, _, own in _of_headline(benchmark, records):
        timed = [r for r in own if "ms" in r and "errors" in r]
        errors = [max(r["errors"].values()) for r in timed]
        if timed and max(errors) > 2 * min(errors):  # else there is nothing to choose between
            held.append(timed)
    if held:
        figure = Figure(figsize=(5.5 * len(held), 4.2), layout="constrained")
        for place, own in enumerate(held, start=1):
            _draw_errors(figure.add_subplot(1, len(held), place), own)
        file = stem.with_name(f"{stem.name}-errors.svg")
        figure.savefig(file, metadata={"Date": None})
        found.append((f"error against time, {benchmark.title(asdict(benchmark.headline))}", file))
    return found


def _along(axis: str, records: Sequence[Record]) -> dict[str, dict[str, list[tuple[float, Record]]]]:
    """By task and provider, the records along an axis, the case's other fields as in the first case of most."""
    alike: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        alike[json.dumps({name: value for name, value in r["case"].items() if name not in (axis, "peers")})].append(r)
    most = max(alike.values(), key=lambda own: len({r["case"][axis] for r in own}))
    lines: dict[str, dict[str, list[tuple[float, Record]]]] = defaultdict(lambda: defaultdict(list))
    for r in most:
        if "ms" in r:
            lines[r["task"]][r["provider"]].append((r["case"][axis], r))
    return {task: own for task, own in lines.items() if max(map(len, own.values())) > 2}


def _draw(plot: Any, lines: dict[str, list[tuple[float, Record]]], axis: str, kind: str, value: Any) -> None:
    for provider, points in lines.items():
        points = sorted(points, key=lambda point: point[0])
        style = "o-" if points[0][1]["ours"] else "o--"
        width = 2.2 if points[0][1]["ours"] else 1.0
        plot.plot([x for x, _ in points], [value(r) for _, r in points], style, label=provider, lw=width, ms=3)
    plot.set(xlabel=axis, ylabel=kind, xscale="log", yscale="log")
    values = sorted({x for points in lines.values() for x, _ in points})
    plot.set_xticks(values, [f"{x:,.0f}" for x in values], rotation=30, fontsize=8)
    plot.set_xticks([], minor=True)
    plot.grid(alpha=0.3)


def _draw_errors(plot: Any, records: Sequence[Record]) -> None:
    """The largest error of each provider against its time."""
    for place, r in enumerate(records):
        style: dict[str, Any] = {"ms": 13, "marker": "*"} if r["ours"] else {"ms": 7, "marker": "osD^vP"[place % 6]}
        plot.plot([r["ms"]], [max(r["errors"].values())], ls="", label=r["provider"], alpha=0.8, **style)
    plot.set(title=records[0]["task"], xlabel="time, ms", ylabel=f"error: {', '.join(records[0]['errors'])}")
    plot.set(xscale="log", yscale="log")
    times = sorted(r["ms"] for r in records)
    plot.set_xticks([times[0], times[-1]], [f"{x:.3g}" for x in (times[0], times[-1])])
    plot.set_xticks([], minor=True)
    plot.margins(0.15)
    plot.grid(alpha=0.3)
    plot.legend(fontsize=7)
