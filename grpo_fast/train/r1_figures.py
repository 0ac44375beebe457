"""The figures of ``grpo-fast r1``: training over steps, and what the models can do at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_fast.train.curves import Line, describe, overlay, png, points
from grpo_fast.train.r1_measure import MODELS
from grpo_fast.train.recorder import METRICS_FILE, read_metrics

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
    runs = {name: read_metrics(folder / name / METRICS_FILE) for name in RUNS}
    lines = [Line(rows, f"C{color}", RUNS[name]) for color, (name, rows) in enumerate(runs.items())]
    panels = [(title, unit.format(**settings), metric) for title, unit, metric in _PANELS]
    figure = overlay(lines, panels, columns=4)
    for line in lines:
        steps, values = points(line.rows, "eval/pass@1")
        if steps[:1] == [0]:
            figure.axes[0].axhline(values[0], color=line.color, ls="--", lw=0.8)
    return png(figure)


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
        for axis, found in ((by_k, model["pass_at"]), (by_level, of_levels)):
            x, shares, errors = zip(*found, strict=True)
            axis.errorbar(x, shares, [1.96 * error for error in errors], fmt="o-", **style)
        for k, share, error in model["cons_at"]:
            by_k.errorbar([k * 1.05], [share], [1.96 * error], fmt="x", **{**style, "label": None})
    by_k.set_xscale("log", base=2)
    by_level.set_xticks(range(len(levels)), [level.replace(": ", ":\n", 1) for level in levels], fontsize=8)
    describe(by_k, "Chance that one of k samples is right", "k", "pass@k (dots), cons@k (crosses)")
    describe(by_level, "Accuracy by level", "", "pass@1")
    describe(by_length, "Accuracy against response length", "tokens a completion", "share right")
    by_k.legend(fontsize=8, loc="lower right")
    return png(figure)
