"""Several runs side by side: whether what they differ in matters more than a seed does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from grpo_fast.train.curves import Line, Panel, overlay, png, points
from grpo_fast.train.files import write_file, write_json
from grpo_fast.train.recorder import METRICS_FILE, SUMMARY_FILE, read_metrics
from grpo_fast.train.report import PANELS
from grpo_fast.train.settings import load_settings
from grpo_fast.train.trainer import SETTINGS_FILE

PICTURE_FILE, RESULTS_FILE = "compare.png", "compare.json"

_PANELS: tuple[Panel, ...] = (("Accuracy on dev problems", "pass@1", "eval/pass@1"), *PANELS)
# The last of its steps that stand for where a run came to, as a share.
_LAST = 0.2


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Draw the runs' curves over one another as ``compare.png``, and write ``compare.json``; both lie in ``out``.

    Returns:
        What the JSON holds: the ``settings`` that all runs share; of each of the ``runs`` those in which it
        ``differs``, its summary without sample answers, and its ``curves``, steps and values of each metric; and
        the ``groups`` of runs that differ in nothing but the seed.

    Raises:
        ValueError: A folder holds no finished run.
    """
    settings, runs, rows = [], [], []
    for folder in folders:
        if not (folder / SUMMARY_FILE).is_file():
            raise ValueError(f"run: {folder} holds no finished run")
        settings.append(asdict(load_settings({}, folder / SETTINGS_FILE)))  # with defaults for what is new
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        del summary["settings"], summary["before"]["examples"], summary["after"]["examples"]
        rows.append(read_metrics(folder / METRICS_FILE))
        curves = {metric: _rounded(*points(rows[-1], metric)) for _, _, metric in _PANELS}
        runs.append({"run": str(folder), **summary, "curves": curves})
    shared = {name: value for name, value in settings[0].items() if all(s[name] == value for s in settings)}
    groups: dict[str, list[int]] = {}
    for number, (run, own) in enumerate(zip(runs, settings, strict=True)):
        run["differs"] = {name: value for name, value in own.items() if name not in shared}
        groups.setdefault(_name(run["differs"]), []).append(number)
    found = {
        "settings": shared,
        "groups": [_results(name, [runs[i] for i in members]) for name, members in groups.items()],
        "runs": runs,
    }
    lines = []
    for color, (name, members) in enumerate(groups.items()):
        own_rows = [rows[i] for i in members]
        mean = [_mean_row(own_rows)] if len(members) > 1 else []
        lines += [Line(of_run, f"C{color}", None if mean else name, 0.5 if mean else 1.5) for of_run in own_rows]
        lines += [Line(of_all, f"C{color}", f"{name}, mean of {len(members)} seeds", 2.0) for of_all in mean]
    figure = overlay(lines, _PANELS, columns=3)
    devices = sorted({run["device"] for run in runs})
    figure.suptitle(", ".join([shared[name] for name in ("model", "task") if name in shared] + devices))
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / PICTURE_FILE, png(figure))
    write_json(out / RESULTS_FILE, found)
    return found


def table(found: dict[str, Any]) -> Table:
    """The groups for the terminal: of each number the mean over its runs, the least and the most."""
    groups = found["groups"]
    made = Table(title=f"mean over runs (least, most); metrics over the last {_LAST:.0%} of the steps")
    for group in ({"name": "", "runs": 0}, *groups):
        made.add_column(f"{group['name']}, {group['runs']} runs" if group["runs"] else "")
    for title in dict.fromkeys(title for group in groups for title in group["results"]):
        every = (group["results"].get(title) for group in groups)
        made.add_row(title, *("" if of is None else "{:.3f} ({:.3f}, {:.3f})".format(*of) for of in every))
    return made


def _name(differs: dict[str, Any]) -> str:
    """What a group has and others have not."""
    return ", ".join(f"{name} {value}" for name, value in differs.items() if name != "seed") or "all settings alike"


def _results(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """[mean, least, most] over a group's runs."""
    values = {f"test pass@1, {when}": [run[when]["pass_at_1"] for run in runs] for when in ("before", "after")}
    for metric in ("reward", "completions/mean_length", "kl"):
        every = [run["curves"][metric][1] for run in runs]
        if all(every):  # without a reference model there is no KL
            values[metric] = [fmean(own[-max(1, round(_LAST * len(own))) :]) for own in every]
    return {
        "name": name,
        "runs": len(runs),
        "results": {metric: [fmean(own), min(own), max(own)] for metric, own in values.items()},
    }


def _rounded(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    return steps, [float(f"{value:.6g}") for value in values]


def _mean_row(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Rows of the mean over runs, at the steps and of the metrics that all of them have."""
    by_step = [{row["step"]: row for row in rows} for rows in runs]
    return [
        {
            metric: fmean(of_run[step][metric] for of_run in by_step)
            for metric in by_step[0][step]
            if all(metric in of_run[step] for of_run in by_step)
        }
        for step in by_step[0]
        if all(step in of_run for of_run in by_step)
    ]
