"""The figures of ``grpo-fast r1``: training over steps, and what the models can do at the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.train.r1_measure import MODELS
from grpo_fast.train.recorder import METRICS_FILE, read_metrics
from grpo_fast.train.report import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The stages with GRPO.
RUNS = {"zero": "R1-Zero", "r1": "R1", "student": "distilled student + RL", "control": "student, RL only"}
# (title, unit, metric)
_PANELS = (
    ("Accuracy on dev problems", "pass@1, dashed: before GRPO", "eval/pass@1"),
    ("Majority vote on dev problems", "cons@{eval_samples}", "eval/cons@k"),
    ("Response length", "tokens a completion", "completions/mean_length"),
    ("Self-corrections", "share of the batch", "completions/rechecks"),
    ("Reward", "mean of the batch", "reward"),
    ("Distance from the start", "KL, nats a token", "kl"),
    ("Clipped tokens", "share", "clip_ratio/region_mean"),
    ("Entropy", "nats a token", "entropy"),
)


def training(folder: Path, settings: dict[str, Any]) -> bytes:
    """Metrics over GRPO steps of all runs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 7.5), layout="constrained")
    runs = {name: read_metrics(folder / name / METRICS_FILE) for name in RUNS}
    for place, (title, unit, key) in enumerate(_PANELS, start=1):
        axis = figure.add_subplot(2, 4, place)
        for color, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            measured = key.startswith("eval/")
            shown = list(values) if measured else smooth(values)
            axis.plot(steps, shown, "o-" if measured else "-", ms=3, color=f"C{color}", label=RUNS[name])
            if key == "eval/pass@1" and steps[0] == 0:
                axis.axhline(values[0], color=f"C{color}", ls="--", lw=0.8)
        _label(axis, title, "GRPO step", unit.format(**settings))
    figure.axes[0].legend(fontsize=8)
    return _png(figure)


def abilities(models: dict[str, dict[str, Any]]) -> bytes:
    """pass@k and accuracy by level, with 95 % intervals, and accuracy by response length, as a PNG.

    Samples of one problem are of a length and right together, so those of a length tell no interval.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 5), layout="constrained")
    by_k, by_level, by_length = (figure.add_subplot(1, 3, place) for place in (1, 2, 3))
    levels = list(next(iter(models.values()))["levels"])
    for color, (name, title) in enumerate(MODELS.items()):
        model = models[name]
        plain: dict[str, Any] = {"color": f"C{color}", "ms": 4, "lw": 1.2, "label": title}
        style = {**plain, "capsize": 2}
        of_levels = [(place, *model["levels"][level]) for place, level in enumerate(levels)]
        by_length.plot(
            *zip(*((length, share) for length, _, share in model["by_length"]), strict=True), "o-", **plain
        )
        for axis, points in ((by_k, model["pass_at"]), (by_level, of_levels)):
            x, shares, errors = zip(*points, strict=True)
            axis.errorbar(x, shares, [1.96 * error for error in errors], fmt="o-", **style)
        for k, share, error in model["cons_at"]:
            by_k.errorbar([k * 1.05], [share], [1.96 * error], fmt="x", **{**style, "label": None})
    by_k.set_xscale("log", base=2)
    by_level.set_xticks(range(len(levels)), [level.replace(": ", ":\n", 1) for level in levels], fontsize=8)
    _label(by_k, "Chance that one of k samples is right", "k", "pass@k (dots), cons@k (crosses)")
    _label(by_level, "Accuracy by level", "", "pass@1")
    _label(by_length, "Accuracy against response length", "tokens a completion", "share right")
    by_k.legend(fontsize=8, loc="lower right")
    return _png(figure)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
