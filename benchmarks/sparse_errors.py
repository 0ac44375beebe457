"""What ``sparse_grad_tol`` leaves out, in float64: ``python -m grpo_fast.benchmarks.sparse_errors [--model NAME]``.

Prints Markdown: for made-up rows over a range of entropies, or for a model's own samples, how many entries a row
keeps, how many rows stay dense, and the relative errors (Frobenius) of the gradients of hidden states, to which small
elements go by chance, and head, to which they do not go; and those errors the other way round. The last line is what
bfloat16 costs by itself: the gradient of the logits and the results, rounded.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._sparse import LONG
from grpo_fast.reference import sparse_rows_ref

from .report import markdown_table

TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
COLUMNS = ["tolerance", "entries: median", "90 %", "99 %", "dense rows", "d hidden", "d weight"] + [
    "d hidden if left out",
    "d weight if drawn",
]
CHUNK = 512


class Kept(NamedTuple):
    """What is kept of rows of the gradient of the logits; everything of dense ones."""

    found: Tensor  # (n, V), small elements drawn
    dropped: Tensor  # (n, V), small elements dropped
    entries: Tensor  # (n,) of a row; all of a dense one's
    dense: Tensor  # (n,) bool


def kept(gradient: Tensor, at_target: Tensor, usual: Tensor, tolerance: float, generator: torch.Generator) -> Kept:
    """Of ``gradient`` (n, V), with the sampled tokens' elements (n, 1)."""
    thresholds, fits = sparse_rows_ref(gradient, at_target.squeeze(1), usual, tolerance)
    t, size = thresholds[:, None], gradient.abs()
    chance = torch.rand(gradient.shape, generator=generator, dtype=gradient.dtype)
    drawn = (size < t) & (chance * t < size)
    count = ((size >= t) | drawn).sum(1)
    dense = ~(fits & (count <= LONG))
    large = (size >= t) | dense[:, None]
    dropped = torch.where(large, gradient, 0.0)
    found = torch.where(drawn & ~large, gradient.sign() * t, dropped)
    return Kept(found, dropped, count.where(~dense, gradient.size(1)), dense)


def synthetic_rows(
    low: float, high: float, rows: int = 256, vocabulary: int = 65536, hidden: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, head, sampled ids): each row is between 8 tokens, at ``low`` to ``high`` nats above a spread of 1.

    The head's rows share a mean of a third of their length, as those of trained models do.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(vocabulary, hidden) / math.sqrt(hidden)
    weight = weight + normal(hidden) / math.sqrt(hidden) / 3
    near = torch.randint(0, vocabulary, (rows, 8), generator=generator)
    heights = (low + (high - low) * torch.rand(rows, 1, generator=generator, dtype=torch.float64)) - 2 * normal(
        rows, 8
    ).abs()
    states = normal(rows, hidden) + torch.einsum("nk,nkh->nh", heights, weight[near])
    p = torch.softmax(states @ weight.T, -1)
    return states, weight, torch.multinomial(p, 1, generator=generator)[:, 0]


def sampled_rows(name: str, answers: int = 12, tokens: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, head, sampled ids) of answers that the model samples at temperature 1 to questions in arithmetic."""
    from grpo_fast.train.model import load_policy

    torch.manual_seed(0)
    policy = load_policy(name, device="cpu")
    model, tokenizer = policy.model.eval(), policy.tokenizer
    question = "Tom has {} apples and buys {} bags of {}. How many apples has he now? Think step by step."
    kept: list[tuple[Tensor, Tensor]] = []
    for i in range(answers):
        message = [{"role": "user", "content": question.format(3 + i, 2 + i % 4, 5 + i % 3)}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            ids = model.generate(prompt, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
            states = model.base_model(ids).last_hidden_state[0]
        kept.append((states[prompt.size(1) - 1 : -1].double(), ids[0, prompt.size(1) :]))
    states, ids = (torch.cat(column) for column in zip(*kept, strict=True))
    return states, model.get_output_embeddings().weight.detach().double(), ids


def table(states: Tensor, weight: Tensor, ids: Tensor, plot: Path | None = None) -> str:
    """The errors of every tolerance, in Markdown. Upstream gradients are normal numbers."""
    upstream = torch.randn(len(ids), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at_ids = torch.cat(
        [
            torch.expm1(torch.log_softmax(x @ weight.T, -1).gather(1, y[:, None]))
            for x, y in zip(states.split(CHUNK), ids.split(CHUNK), strict=True)
        ]
    )
    usual = (upstream * at_ids).square().mean().sqrt()
    generator = torch.Generator().manual_seed(2)
    counts: dict[float, list[Tensor]] = {t: [] for t in TOLERANCES}
    dense: dict[float, list[Tensor]] = {t: [] for t in TOLERANCES}
    off: dict[float | str, Tensor] = {}  # squares, of the hidden states' gradients
    d_weight: dict[float | str, Tensor] = {}  # with small elements left out, and drawn
    size, entropies = 0.0, []
    whole = torch.zeros_like(weight)
    for x, y, c in zip(states.split(CHUNK), ids.split(CHUNK), upstream.split(CHUNK), strict=True):
        log_p = torch.log_softmax(x @ weight.T, -1)
        entropies.append(-(log_p.exp() * log_p).sum(1))
        g = -log_p.exp()
        g.scatter_(1, y[:, None], -torch.expm1(log_p.gather(1, y[:, None])))
        g *= c
        exact = g @ weight
        size += exact.square().sum().item()
        whole += g.T @ x
        for t in (*TOLERANCES, "bfloat16"):
            if isinstance(t, float):
                rows = kept(g, g.gather(1, y[:, None]), usual, t, generator)
                d_hidden = torch.stack([rows.found @ weight, rows.dropped @ weight])
                more = torch.stack([rows.dropped.T @ x, rows.found.T @ x])
                counts[t].append(rows.entries)
                dense[t].append(rows.dense)
            else:
                found = g.bfloat16().double()
                d_hidden = (found @ weight).bfloat16().double()[None]
                more = (found.T @ x)[None]
            off[t] = off.get(t, 0.0) + (d_hidden - exact).square().sum((1, 2))
            d_weight[t] = d_weight.get(t, 0.0) + more
    lines = []
    for t in (*TOLERANCES, "bfloat16"):
        got = d_weight[t].bfloat16().double() if t == "bfloat16" else d_weight[t]
        of_hidden = (off[t] / size).sqrt().tolist()
        of_weight = ((got - whole).square().sum((1, 2)).sqrt() / whole.norm()).tolist()
        cells = ["bfloat16", "", "", "", ""]
        if isinstance(t, float):
            levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
            quantiles = torch.cat(counts[t]).double().quantile(levels).tolist()
            cells = [f"{t:.0e}", *(f"{q:,.0f}" for q in quantiles), f"{torch.cat(dense[t]).double().mean():.1%}"]
        pairs = [e for pair in zip(of_hidden, of_weight, strict=True) for e in pair]
        lines.append([*cells, *(f"{x:.1e}" for x in pairs), *[""] * (4 - len(pairs))])
    if plot is not None:
        draw({t: torch.cat(counts[t]).double() for t in TOLERANCES}, len(weight), plot)
    h = torch.cat(entropies)
    what = f"{len(ids):,} rows, V {len(weight):,}, H {weight.size(1):,}; entropy {h.mean():.2f} nats"
    what += f", median {h.median():.2f}"
    return f"{what}\n\n{markdown_table(COLUMNS, lines)}\n"


def draw(counts: dict[float, Tensor], vocabulary: int, file: Path) -> None:
    """How many rows keep so many entries, tolerance by tolerance; dense ones keep them all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    edges = [*torch.logspace(0, math.log10(vocabulary), 28).tolist(), 1.5 * vocabulary]
    for tolerance, count in counts.items():
        heights, _ = torch.histogram(count.clamp(min=1.0), torch.tensor(edges, dtype=torch.float64))
        axes.stairs((100 * heights / len(count)).tolist(), edges, label=f"{tolerance:.0e}")
    axes.set(
        xscale="log", xlabel="entries of a row that are kept; dense rows at the right end", ylabel="% of the rows"
    )
    axes.legend(title="sparse_grad_tol")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's own samples, in place of made-up rows: smollm2-135m, a path")
    parser.add_argument("--answers", type=int, default=12, help="with --model (default: 12)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --model: draw how many entries rows keep")
    options = parser.parse_args()
    if options.model is not None:
        print(table(*sampled_rows(options.model, options.answers), options.plot))
        return
    for low, high in ((24, 36), (16, 28), (8, 20), (2, 8)):
        print(f"{low} to {high} nats: {table(*synthetic_rows(low, high))}", flush=True)


if __name__ == "__main__":
    main()
