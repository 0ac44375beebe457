"""What a person looks at after a run: a figure, a table, and sample answers before and after."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from grpo_fast.train.curves import Panel, describe, png, points, smooth
from grpo_fast.train.evaluate import Evaluation
from grpo_fast.train.files import write_file
from grpo_fast.train.recorder import METRICS_FILE, SUMMARY_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# (title, key of an Evaluation, how it is shown)
_ROWS = (
    ("pass@1, mean over samples", "pass_at_1", "{:.1%}"),
    ("cons@{samples}, majority vote", "cons_at_k", "{:.1%}"),
    ("greedy", "greedy", "{:.1%}"),
    ("well formed", "well_formed", "{:.1%}"),
    ("re-checks itself", "rechecks", "{:.1%}"),
    ("tokens a completion", "mean_length", "{:.1f}"),
)
#: What a run's training batches are drawn by.
PANELS: tuple[Panel, ...] = (
    ("Reward", "mean of the batch", "reward"),
    ("Length", "tokens a completion", "completions/mean_length"),
    ("Distance from the start", "KL, nats a token", "kl"),
    ("Clipped tokens", "share", "clip_ratio/region_mean"),
    ("Entropy", "nats a token", "entropy"),
)


def write(folder: Path) -> dict[str, Any]:
    """Draw ``report.png`` and write ``report.md`` in a finished run's folder; returns its summary."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    plot(folder, summary)
    write_file(folder / "report.md", _markdown(summary))
    return summary


def table(summary: dict[str, Any]) -> Table:
    """Before and after GRPO, on test problems, for the terminal."""
    settings = summary["settings"]
    made = Table(title=f"{settings['model']} on {settings['task']}: {summary['after']['problems']} test problems")
    for column in ("", "before GRPO", "after", "change"):
        made.add_column(column, justify="left" if column == "" else "right")
    for row in _cells(summary):
        made.add_row(*row)
    return made


def evaluation_table(found: Evaluation) -> Table:
    """One evaluation for the terminal."""
    made = Table(title=f"{found.problems} problems, {found.samples} samples each")
    made.add_column("")
    made.add_column("", justify="right")
    values = asdict(found)
    for title, key, form in _ROWS:
        made.add_row(title.format(**values), _value(values, key, form))
    return made


def plot(folder: Path, summary: dict[str, Any]) -> None:
    """Draw accuracy, reward, length, KL, clip fraction and entropy over steps as ``report.png``."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder / METRICS_FILE)
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    first, *others = figure.subplots(2, 3).flat
    _accuracy(first, rows)
    for axis, (title, unit, metric) in zip(others, PANELS, strict=True):
        _series(axis, rows, metric)
        describe(axis, title, "GRPO step", unit)
    settings = summary["settings"]
    figure.suptitle(f"GRPO: {settings['model']} on {settings['task']}, seed {settings['seed']}, {summary['device']}")
    write_file(folder / "report.png", png(figure))


def _accuracy(axis: Axes, rows: list[dict[str, float]]) -> None:
    steps, values = points(rows, "rewards/accuracy/mean")
    if steps:
        axis.plot(steps, values, color="0.8", lw=0.8, label="training batch")
    measured = [r for r in rows if "eval/pass@1" in r]
    if measured:
        steps = [r["step"] for r in measured]
        mean, error = ([r[f"eval/pass@1{s}"] for r in measured] for s in ("", "_se"))
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color="C0", alpha=0.15, lw=0)
        axis.plot(steps, mean, "o-", color="C0", ms=4, label="pass@1 (± 1 s.e.)")
        axis.plot(steps, [r["eval/cons@k"] for r in measured], "s-", color="C2", ms=4, label="cons@k")
        axis.plot(steps, [r["eval/greedy"] for r in measured], "^-", color="C1", ms=4, lw=0.8, label="greedy")
        if steps[0] == 0:
            axis.axhline(mean[0], color="C3", ls="--", label="before GRPO, pass@1")
    axis.set_ylim(0, 1.02)
    describe(axis, "Accuracy on dev problems", "GRPO step", "share right")
    axis.legend(fontsize=8, loc="lower right", framealpha=1.0, edgecolor="none")


def _series(axis: Axes, rows: list[dict[str, float]], metric: str) -> None:
    steps, values = points(rows, metric)
    if not steps:
        axis.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axis.transAxes, color="0.5")
        return
    axis.plot(steps, values, color="C0", lw=0.7, alpha=0.4)
    axis.plot(steps, smooth(values), color="C0", lw=1.8)


def _value(values: dict[str, Any], key: str, form: str) -> str:
    text = form.format(values[key])
    return f"{text} ± {values['pass_at_1_se']:.1%}" if key == "pass_at_1" else text


def _cells(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    before, after = summary["before"], summary["after"]
    cells = []
    for title, key, form in _ROWS:
        change = after[key] - before[key]
        points = f"{change * 100:+.1f} points" if form.endswith("%}") else f"{change:+.1f}"
        cells.append((title.format(**after), _value(before, key, form), _value(after, key, form), points))
    return cells


def _markdown(summary: dict[str, Any]) -> str:
    settings, seconds = summary["settings"], summary["seconds"]
    lines = [
        f"# GRPO: {settings['model']} on {settings['task']}",
        "",
        f"`{summary['command']}`",
        "",
        "![accuracy, reward, length, KL, clip fraction and entropy over steps](report.png)",
        "",
        f"On {summary['after']['problems']} test problems, which chose nothing in this run,"
        f" {summary['after']['samples']} samples each (± is one standard error):",
        "",
        "| | before GRPO | after | change |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in _cells(summary)),
        "",
        "## Answers to the same problems, greedy",
        "",
        "| problem | right answer | before GRPO | after |",
        "|---|---|---|---|",
    ]
    for before, after in zip(summary["before"]["examples"], summary["after"]["examples"], strict=True):
        cells = [f"`{_inline(e['completion'])}` {'✓' if e['right'] else '✗'}" for e in (before, after)]
        lines.append(f"| `{_inline(after['question'])}` | `{after['answer']}` | {cells[0]} | {cells[1]} |")
    times = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in seconds.items())
    found = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    lines += ["", f"Time on {summary['device']}: {times}.", "", f"Versions: {found}.", "", "## Settings", ""]
    lines += [f"- {name}: `{value!r}`" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    """Text that keeps to its cell and its code span."""
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
