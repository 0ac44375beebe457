"""What a person looks at after ``grpo-fast r1``: one page with its figures in it, a table, and sample answers."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo_fast.train.r1 import LEVELS, MEASURED_FILE, MODELS, lessons
from grpo_fast.train.recorder import METRICS_FILE, read_metrics
from grpo_fast.train.report import smooth

REPORT_FILE = "report.html"
FIGURE_FILE = "report.png"

_RUNS = {"zero": "R1-Zero", "r1": "R1", "student": "distilled student + RL", "control": "student, RL only"}
# (title, unit, metric)
_PANELS = (
    ("Accuracy on dev problems", "pass@1, dashed: before GRPO", "eval/pass@1"),
    ("Majority vote", "cons@8 on dev problems", "eval/cons@k"),
    ("Response length", "tokens a completion", "completions/mean_length"),
    ("Reward", "mean of the batch", "reward"),
    ("Distance from the start", "KL, nats a token", "kl"),
    ("Entropy", "nats a token", "entropy"),
)
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f4f4f4;padding:0 .2em}
.yes{color:#176b2c}.no{color:#a03020}"""


def table(measured: dict[str, Any]) -> Table:
    """All models on the same test problems, for the terminal."""
    columns, rows = cells(measured)
    made = Table(title=f"{measured['task']}, seed {measured['seed']}, {measured['device']}")
    for column in columns:
        made.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        made.add_row(*row)
    return made


def cells(measured: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of that table."""
    models = measured["models"]
    samples = next(iter(models.values()))["samples"]
    columns = ["", "parameters", "pass@1", f"cons@{samples}", "greedy", "without thinking", "tokens", "well formed"]
    rows = [
        [
            m["title"],
            f"{m['parameters'] / 1e6:.2f} M",
            f"{m['pass_at_1']:.1%} ± {m['pass_at_1_se']:.1%}",
            f"{m['cons_at_k']:.1%}",
            f"{m['greedy']:.1%}",
            f"{m['without_thought'][0]:.1%}",
            f"{m['mean_length']:.1f}",
            f"{m['well_formed']:.1%}",
        ]
        for m in (models[name] for name in MODELS)
    ]
    return columns, rows


def write(folder: Path) -> dict[str, Any]:
    """Write ``report.html``, which needs nothing beside it, and ``report.png``; returns what was measured."""
    measured: dict[str, Any] = json.loads((folder / MEASURED_FILE).read_text(encoding="utf-8"))
    picture = _figure(folder)
    for name, content in ((FIGURE_FILE, picture), (REPORT_FILE, _page(measured, picture).encode())):
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return measured


def _figure(folder: Path) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    runs = {name: read_metrics(folder / name / METRICS_FILE) for name in _RUNS}
    for place, (title, unit, key) in enumerate(_PANELS, start=1):
        axis = figure.add_subplot(2, 3, place)
        for color, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            measured = key.startswith("eval/")
            shown = list(values) if measured else smooth(values)
            axis.plot(steps, shown, "o-" if measured else "-", ms=3, color=f"C{color}", label=_RUNS[name])
            if key == "eval/pass@1" and steps[0] == 0:
                axis.axhline(values[0], color=f"C{color}", ls="--", lw=0.8)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set(xlabel="GRPO step", ylabel=unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _page(measured: dict[str, Any], picture: bytes) -> str:
    models = measured["models"]
    columns, rows = cells(measured)
    taught = [
        f'<li><b class="{"yes" if holds else "no"}">{"Holds" if holds else "Does not hold here"}:</b> '
        f"{html.escape(lesson)}. {html.escape(numbers)}.</li>"
        for lesson, holds, numbers in lessons(measured)
    ]
    by_level = [
        [m["title"], *(f"{m['levels'][level][0]:.1%} ± {m['levels'][level][1]:.1%}" for level in LEVELS)]
        for m in (models[name] for name in MODELS)
    ]
    examples = [
        [
            f"<code>{html.escape(example['question'])}</code>",
            *(_answer(models[name]["examples"][i]) for name in ("zero/cold_start", "r1/model", "distilled/model")),
        ]
        for i, example in enumerate(models["r1/model"]["examples"])
    ]
    traces, first = measured["traces"], next(iter(models.values()))
    seconds = [
        [
            _RUNS.get(stage, stage),
            *(_shown(spent, part) for part in ("cold_start", "rollout", "rewards", "update", "evaluation")),
        ]
        for stage, spent in measured["seconds"].items()
    ]
    parts = [
        f"<h1>DeepSeek-R1 in miniature: {html.escape(measured['task'])}</h1>",
        f"<ul>{''.join(taught)}</ul>",
        f'<img alt="accuracy, length, reward, KL and entropy over steps" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
        f"<h2>On {first['problems']} test problems, {first['samples']} samples each</h2>"
        "<p>No model was trained on them or chosen by them; ± is one standard error. Without thinking: the answer "
        "has to follow at once, which no model was trained to do.</p>",
        _table(columns, rows),
        "<h2>pass@1 by level</h2>",
        _table(["", *LEVELS], by_level),
        f"<p>The teacher wrote {traces['sampled']:,} answers, {traces['right']:,} of them right. The student learned "
        f"{traces['kept']:,}: the right and well formed, each once.</p>",
        "<h2>Answers to the same problems, greedy</h2>",
        _table(["problem", "base", "R1, the teacher", "distilled student"], examples),
        "<h2>Seconds</h2>",
        _table(["", "supervised", "rollout", "scoring", "loss and optimizer", "evaluation"], seconds),
        f"<p>On {html.escape(measured['device'])}, seed {measured['seed']}; "
        f"{html.escape(', '.join(f'{name} {value}' for name, value in measured['versions'].items()))}.</p>",
    ]
    head = f'<!doctype html><meta charset="utf-8"><title>R1 in miniature</title><style>{_STYLE}</style>'
    return head + "\n".join(parts) + "\n"


def _answer(example: dict[str, Any]) -> str:
    return f"<code>{html.escape(example['completion'])}</code> {'✓' if example['right'] else '✗'}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(spent: dict[str, float] | float, part: str) -> str:
    """The seconds of a part of a stage; distillation has one part."""
    if isinstance(spent, dict):
        return f"{spent[part]:.0f}" if part in spent else ""
    return f"{spent:.0f}" if part == "cold_start" else ""
