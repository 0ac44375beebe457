"""What a person looks at after ``grpo-fast r1``: one page with its figures in it, tables, and sample answers."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo_fast.train.files import write_file
from grpo_fast.train.r1 import MEASURED_FILE
from grpo_fast.train.r1_figures import RUNS, abilities, training
from grpo_fast.train.r1_measure import MODELS, lessons

REPORT_FILE = "report.html"
TRAINING_FILE, ABILITIES_FILE = "training.png", "abilities.png"

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:80em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f4f4f4;padding:0 .2em}
.yes{color:#176b2c}.no{color:#a03020}"""
# Parts of a run's seconds, and what the page calls them.
_PARTS = {
    "cold_start": "supervised",
    "rollout": "rollout",
    "rewards": "scoring",
    "loss": "loss",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
}


def table(measured: dict[str, Any]) -> Table:
    """All models on the same test problems, for the terminal."""
    columns, rows = cells(measured["models"])
    recipe = measured["recipe"]
    made = Table(title=f"{recipe['teacher']['task']}, seed {recipe['seed']}, {measured['device']}")
    for column in columns:
        made.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        made.add_row(*row)
    return made


def cells(models: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of that table."""
    first = next(iter(models.values()))
    votes = [f"cons@{k}" for k, *_ in first["cons_at"]]
    columns = ["", "parameters", "pass@1", *votes, "greedy", "without thinking", "tokens", "well formed"]
    rows = [
        [
            m["title"],
            f"{m['parameters'] / 1e6:.2f} M",
            _share(m["pass_at_1"], m["pass_at_1_se"]),
            *(_share(share, error) for _, share, error in m["cons_at"]),
            f"{m['greedy']:.1%}",
            f"{m['without_thought'][0]:.1%}",
            f"{m['mean_length']:.1f}",
            f"{m['well_formed']:.1%}",
        ]
        for m in (models[name] for name in MODELS)
    ]
    return columns, rows


def write(folder: Path) -> dict[str, Any]:
    """Write ``report.html``, which needs nothing beside it, and its figures; returns what was measured."""
    measured: dict[str, Any] = json.loads((folder / MEASURED_FILE).read_text(encoding="utf-8"))
    pictures = [training(folder, measured["recipe"]["teacher"]), abilities(measured["models"])]
    page = _page(measured, *pictures).encode()
    for name, content in zip((TRAINING_FILE, ABILITIES_FILE, REPORT_FILE), (*pictures, page), strict=True):
        write_file(folder / name, content)
    return measured


def _page(measured: dict[str, Any], over_steps: bytes, at_the_end: bytes) -> str:
    models, recipe, traces = measured["models"], measured["recipe"], measured["traces"]
    first = next(iter(models.values()))
    taught = [
        f'<li><b class="{"yes" if holds else "no"}">{"Holds" if holds else "Does not hold here"}:</b> '
        f"{html.escape(lesson)}. {html.escape(numbers)}.</li>"
        for lesson, holds, numbers in lessons(models)
    ]
    chosen = [models[name] for name in MODELS]
    by_level = [[m["title"], *(_share(*m["levels"][level]) for level in first["levels"])] for m in chosen]
    by_k = [[m["title"], *(_share(share, error) for _, share, error in m["pass_at"])] for m in chosen]
    shown = ("zero/cold_start", "zero/model", "r1/model", "distilled/model", "control/model")
    examples = [
        [f"<code>{html.escape(example['question'])}</code>", *(_answer(models[n]["examples"][i]) for n in shown)]
        for i, example in enumerate(models["r1/model"]["examples"])
    ]
    parts = [
        f"<h1>DeepSeek-R1 in miniature: {html.escape(recipe['teacher']['task'])}</h1>",
        f"<ul>{''.join(taught)}</ul>",
        _image("accuracy, length, self-corrections, reward, KL, clipped tokens and entropy over steps", over_steps),
        f"<h2>On {first['problems']} test problems, {first['samples']} samples each</h2>"
        "<p>No model was trained on them or chosen by them; ± is one standard error. Without thinking: the answer "
        "has to follow at once, which no model was trained to do.</p>",
        _table(*cells(models)),
        _image("pass@k and accuracy by level, with 95 % intervals; accuracy by response length", at_the_end),
        "<h2>pass@k</h2>",
        _table(["", *(f"pass@{k}" for k, *_ in first["pass_at"])], by_k),
        "<h2>pass@1 by level</h2>",
        _table(["", *first["levels"]], by_level),
        "<h2>Slips and self-corrections</h2>"
        "<p>Steps are equations of the samples' thoughts. A wrong one is noticed if “wait” follows, and repaired if "
        "the same sum then comes out right; a false alarm is “wait” after a right one. The worked traces of the cold "
        "start hold both slips and repairs.</p>",
        _table(
            ["", "samples with “wait”", "of them right", "steps", "wrong", "noticed", "repaired", "false alarms"],
            [_corrections(m) for m in chosen],
        ),
        f"<p>The teacher wrote {traces['sampled']:,} answers in {traces['seconds']:.0f} s, {traces['right']:,} of "
        f"them right. The student learned {traces['kept']:,}: the right and well formed, each once. In them are "
        f"{traces['corrections']['repaired']:,} repaired slips.</p>",
        "<h2>Answers to the same problems, greedy, with their reward</h2>",
        _table(["problem", *(models[name]["title"] for name in shown)], examples),
        "<h2>Seconds</h2>",
        _table(
            ["", *_PARTS.values()],
            [[RUNS.get(stage, stage), *_seconds(spent)] for stage, spent in measured["seconds"].items()],
        ),
        f"<p>On {html.escape(measured['device'])}, seed {recipe['seed']}; "
        f"{html.escape(', '.join(f'{name} {value}' for name, value in measured['versions'].items()))}.</p>",
        f"<details><summary>Settings</summary><pre>{html.escape(json.dumps(recipe, indent=1))}</pre></details>",
    ]
    head = f'<!doctype html><meta charset="utf-8"><title>R1 in miniature</title><style>{_STYLE}</style>'
    return head + "\n".join(parts) + "\n"


def _share(value: float, error: float) -> str:
    return f"{value:.1%} ± {error:.1%}"


def _image(description: str, picture: bytes) -> str:
    return f'<img alt="{description}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def _answer(example: dict[str, Any]) -> str:
    mark = "✓" if example["right"] else "✗"
    return f"<code>{html.escape(example['completion'])}</code> {mark} {example['reward']:.1f}"


def _corrections(model: dict[str, Any]) -> list[str]:
    found, right = model["corrections"], model["right_if_rechecked"]
    noticed, slips = found["noticed"], found["slips"]
    return [
        model["title"],
        f"{model['rechecks']:.1%}",
        "" if right is None else f"{right:.1%}",
        f"{found['steps']:,}",
        f"{slips:,}",
        f"{noticed:,} ({noticed / max(slips, 1):.1%})",
        f"{found['repaired']:,} ({found['repaired'] / max(noticed, 1):.1%} of them)",
        f"{found['false_alarms']:,}",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _seconds(spent: dict[str, float] | float) -> list[str]:
    """The seconds of a stage by part; distillation has one part."""
    parts = spent if isinstance(spent, dict) else {"cold_start": spent}
    return [f"{parts[part]:.0f}" if part in parts else "" for part in _PARTS]
