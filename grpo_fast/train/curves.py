"""Metrics of several runs over their GRPO steps, drawn over one another."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: (title, unit, metric)
Panel = tuple[str, str, str]


@dataclass(frozen=True)
class Line:
    """A run's rows of metrics, and how they are drawn; without a label, the legend leaves it out."""

    rows: Sequence[dict[str, float]]
    color: str
    label: str | None
    width: float = 1.5


def points(rows: Sequence[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """The steps at which a metric was taken, and its values."""
    taken = [(row["step"], row[metric]) for row in rows if metric in row]
    return [step for step, _ in taken], [value for _, value in taken]


def overlay(lines: Sequence[Line], panels: Sequence[Panel], columns: int) -> Figure:
    """A figure with a panel a metric, all lines in each: those of a training batch smoothed, evaluations as dots."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.75 * rows), layout="constrained")
    for place, (title, unit, metric) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, place)
        for line in lines:
            steps, values = points(line.rows, metric)
            measured = metric.startswith("eval/")
            axis.plot(
                steps,
                values if measured else smooth(values),
                "o-" if measured else "-",
                ms=2 * line.width,
                lw=line.width,
                color=line.color,
                label=line.label,
            )
        describe(axis, title, "GRPO step", unit)
    figure.axes[0].legend(fontsize=8)
    return figure


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average with its start corrected for the values it has not seen."""
    smooth, total, out = 0.0, 0.0, []
    for value in values:
        smooth, total = weight * smooth + (1 - weight) * value, weight * total + (1 - weight)
        out.append(smooth / total)
    return out


def describe(axis: Axes, title: str, x: str, y: str) -> None:
    """Titles, and a grid behind."""
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
