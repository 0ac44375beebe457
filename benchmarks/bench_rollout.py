"""Sampling of a training step: the loop's two ways to decode, and what transformers has."""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_fast import linear_selective_log_softmax

from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, attempt, run_task

RUNS = 5  # a call takes a second
NOTES = """\
Problems of chain_sum, several completions of each, sampled at temperature 1 from a model that has made so many
supervised steps on worked traces, so that completions end as they do in training. "tokens" are those of one call,
end tokens included. The ceiling reads the prompts, each once. The loop's weights are float32, computed with in
bfloat16 by autocast if the model is a pretrained one; transformers gets a copy of those in bfloat16. A drawn token's
log-prob is minus the entropy on average: "log-prob, sigmas error" is how far the mean over all tokens is from that,
in standard errors. Times are medians of five; what is compiled, captured or kept for the next call is in neither
times nor MiB, but in the first call."""


@dataclass(frozen=True)
class Case:
    model: str = "smollm2-135m"
    cold_start_steps: int = 10
    prompts: int = 32
    group_size: int = 16
    max_new_tokens: int = 64


BASE = Case()
SMALL = Case("small", cold_start_steps=100)


class Inputs:
    """A policy that has begun to learn, its prompts, and what transformers is given."""

    def __init__(self, case: Case) -> None:
        from transformers import GenerationConfig

        from grpo_fast.train.graphed import can_be_graphed
        from grpo_fast.train.model import load_policy, quiet_transformers
        from grpo_fast.train.rollout import pad_left
        from grpo_fast.train.settings import load_settings
        from grpo_fast.train.supervised import supervised_loss, worked

        quiet_transformers()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        settings = load_settings({"model": case.model})
        task, batch = settings.load_task(), settings.cold_start_batch
        self.case, self.policy = case, load_policy(case.model, device=DEVICE)
        model = self.policy.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.cold_start_lr, weight_decay=0.0)
        for step in range(case.cold_start_steps):
            supervised_loss(self.policy, worked(task.problems("train", step * batch, batch))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        self.prompts = [self.policy.prompt(problem) for problem in task.problems("dev", 0, case.prompts)]
        self.ids, self.mask = pad_left(self.prompts, self.policy.pad_id, self.policy.device)
        self.can_be_graphed = can_be_graphed(self.policy, getattr(self.read(), self.policy.cache_name))
        self.plain = copy.copy(self.policy)
        self.plain.model = copy.copy(model)
        self.plain.model._can_compile_fullgraph = False  # as of models that cannot be captured
        self.theirs = copy.deepcopy(model)
        for weight in self.theirs.parameters() if self.policy.autocast else ():
            weight.data = weight.data.bfloat16()  # the frequencies of positions stay float32, as in a loaded model
        self.options = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=case.max_new_tokens,
            num_return_sequences=case.group_size,
            eos_token_id=self.policy.eos_id,
            pad_token_id=self.policy.pad_id,
        )

    @torch.no_grad()
    def read(self) -> Any:
        """A pass over the prompts."""
        return self.policy.forward(self.ids, self.mask, use_cache=True)

    @torch.no_grad()
    def sigmas(self, ids: Tensor, mask: Tensor) -> float:
        """How far completions (B, T) are from ones that the policy drew, by the mean of log-prob + entropy."""
        start, size = self.ids.size(1), self.case.group_size
        whole = torch.cat([self.ids.repeat_interleave(size, 0), ids], 1)
        seen = torch.cat([self.mask.repeat_interleave(size, 0), mask], 1)
        off = []
        for i, m in zip(whole.split(128), seen.split(128), strict=True):
            states, index, counts = self.policy.hidden_states(i, m)[:, start - 1 : -1], i[:, start:], m[:, start:]
            found = linear_selective_log_softmax(
                states, index=index, mask=counts, return_entropy=True, **self.policy.head
            )
            off.append((found[0] + found[1])[counts].double())
        every = torch.cat(off)
        return float(every.mean().abs() / every.std() * len(every) ** 0.5)


#: Completions (B, T) and their mask.
Drawn = tuple[Tensor, Tensor]


def ours(x: Inputs, graphed: bool) -> Drawn:
    from grpo_fast.train.rollout import sample

    if graphed and not x.can_be_graphed:
        raise RuntimeError("CUDA graphs need a GPU, and a model that can be captured")
    drawn = sample(
        x.policy if graphed else x.plain,
        x.prompts,
        group_size=x.case.group_size,
        max_new_tokens=x.case.max_new_tokens,
        temperature=1.0,
        generator=torch.Generator(x.policy.device).manual_seed(0),
    )
    return drawn.completion_ids, drawn.completion_mask


def generate(x: Inputs, cache: str | None) -> Drawn:
    torch.manual_seed(0)
    options = copy.copy(x.options)
    options.cache_implementation = cache
    found = x.theirs.generate(x.ids, attention_mask=x.mask.long(), generation_config=options)
    return until_the_end(x, found[:, x.ids.size(1) :])


def continuous_batching(x: Inputs) -> Drawn:
    torch.manual_seed(0)
    options = copy.copy(x.options)
    options.num_return_sequences = 1  # not every release heeds more
    every = [prompt for prompt in x.prompts for _ in range(x.case.group_size)]
    found = x.theirs.generate_batch(every, generation_config=options, persistent_manager=True).values()
    rows = [torch.tensor(request.generated_tokens) for request in found if request.error is None]
    if len(rows) < len(x.prompts) * x.case.group_size:
        raise RuntimeError(
            f"{len(rows)} completions, and {[request.error for request in found if request.error][:1]}"
        )
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=x.policy.eos_id)
    return until_the_end(x, padded.to(x.policy.device))


def until_the_end(x: Inputs, ids: Tensor) -> Drawn:
    ended = (ids == x.policy.eos_id).int()
    return ids, ended.cumsum(1) == ended


TASK = Task(
    "sampling",
    "reading the prompts",
    (
        Provider("grpo_fast, CUDA graphs", partial(ours, graphed=True), ours=True),
        Provider("grpo_fast, plain loop", partial(ours, graphed=False), ours=True),
        Provider("transformers generate", partial(generate, cache=None)),
        Provider("transformers generate, static cache", partial(generate, cache="static")),
        Provider("transformers continuous batching", continuous_batching),
    ),
    {"log-prob, sigmas": 5.0},
)


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    gc.collect()  # continuous batching kept most of the memory of the case before
    prepared = attempt(lambda: {"x": Inputs(case)})
    if "skipped" in prepared:
        of_all = {"case": asdict(case), "task": TASK.name, "ceiling": TASK.ceiling, **prepared}
        return [{**of_all, "provider": p.name, "ours": p.ours} for p in TASK.providers if takes_part(p)]
    x, few, records, tokens = prepared["x"], Timer(min(timer.runs, RUNS), warmup=1, device=timer.device), [], 0
    began = first = 0.0

    def errors(drawn: Drawn) -> dict[str, float]:
        nonlocal tokens, first
        tokens = int(drawn[1].sum())
        first = time.perf_counter() - began
        return {"log-prob, sigmas": x.sigmas(*drawn)}

    for provider in TASK.providers:
        task = replace(TASK, providers=(provider,))
        began = time.perf_counter()
        for record in run_task(few, case, task, x, ceiling=x.read, takes_part=takes_part, errors=errors):
            if "ms" in record:
                speed = tokens / record["ms"] * 1e3
                record["columns"] = {
                    "tokens": f"{tokens:,}",
                    "tokens/s": f"{speed:,.0f}",
                    "first call, s": f"{first:.1f}",
                }
            records.append(record)
    return records


def title(case: dict[str, Any]) -> str:
    sizes = f"{case['prompts']} prompts x {case['group_size']} completions of at most {case['max_new_tokens']} tokens"
    return f"{case['model']}, {sizes}"


BENCHMARK = Benchmark(
    name="rollout",
    summary="sampling of a training step, by the loop and by transformers",
    notes=NOTES,
    cases=(BASE, SMALL),
    quick=(),  # transformers compiles for half a minute
    headline=BASE,
    measure=measure,
    title=title,
)
