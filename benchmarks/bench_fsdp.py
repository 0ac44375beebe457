"""A GRPO training step of a 1.5B-shaped model under FSDP2, on one GPU and on several: weak scaling.

It is run by bench_distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import linear_grpo_loss
from grpo_fast.train.sharding import Root, shard, whole

from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, run_task
from .ranks import merged

NOTES = """\
A transformers model of Qwen2.5-1.5B's shape with random weights in bfloat16, its head tied to its embedding:
forward, loss, backward and fused AdamW, without activation checkpointing. Every GPU has as many tokens, so
without losses a step takes as long on several as on one. On one GPU nothing is sharded and each does the same
work beside the others; on several, each layer and the root are wrapped by `fully_shard`, and the loss is called
in the `forward` of the module that owns the head, where its weight is whole. The ceiling is the step without head
and loss. The loss is the default (`dapo`) over the tokens of all GPUs. Errors are against one process over the
batch of all GPUs, its log-softmax in float64 and the model as it is, in bfloat16: the loss, and the gradient of
the last norm's weight, relative in the Frobenius norm. Memory is the peak of a GPU beyond its part of weights and
optimizer."""


@dataclass(frozen=True)
class Case:
    """So many sequences on each of so many GPUs."""

    ranks: int = 1
    sequences: int = 8
    prompt: int = 256
    completion: int = 768
    hidden: int = 1536
    intermediate: int = 8960
    layers: int = 28
    heads: int = 12
    vocabulary: int = 151936


def random_model(case: Case) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=max(case.heads // 6, 1),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


class Inputs:
    """A model, its optimizer, and the batches of all ranks, of which this rank's is ``batch``."""

    def __init__(self, case: Case) -> None:
        self.root = Root(random_model(case))
        self.everyone = [self._random(case, rank) for rank in range(dist.get_world_size())]
        self.batch = self.everyone[dist.get_rank()]
        self.share = self.batch["completion_ids"].numel()  # tokens of a rank
        self.ranks = case.ranks
        alone = case.ranks == 1
        self.expected = self._truth([self.batch] if alone else self.everyone)
        if not alone:
            self.root = shard(self.root.model, DEVICE)
        # At rate 0 the weights stay, so that each run does the same.
        self.optimizer = torch.optim.AdamW(self.root.parameters(), lr=0.0, weight_decay=0.0, fused=DEVICE == "cuda")

    @staticmethod
    def _random(case: Case, rank: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(1 + rank)
        shape = (case.sequences, case.prompt + case.completion)
        ids = torch.randint(0, case.vocabulary, shape, generator=g)
        found = {
            "input_ids": ids,
            "completion_ids": ids[:, case.prompt :].contiguous(),
            "advantages": torch.randn(case.sequences, generator=g),
            "noise": 0.1 * torch.randn(case.sequences, case.completion, generator=g),
        }
        return {name: x.to(DEVICE) for name, x in found.items()}

    def _truth(self, batches: list[dict[str, Tensor]]) -> tuple[list[float], Tensor]:
        """The parts of the loss of each batch, and the norm's gradient; sets the old log-probs of each."""
        self.root.zero_grad()
        losses = []
        for batch in batches:
            with torch.no_grad():
                self.loss(_remember, batch)
            loss = self.loss(lambda *x: _exact(*x) / (self.share * len(batches)), batch)
            loss.backward()
            losses.append(loss.item())
        gradient = self.norm_gradient().clone()
        self.root.zero_grad()
        return losses, gradient

    def loss(self, loss: Callable[..., Tensor], batch: dict[str, Any]) -> Tensor:
        """The loss of a batch, in the ``forward`` of what owns the head."""
        model, completion = self.root.model, batch["completion_ids"]

        def work() -> Tensor:
            states = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
            return loss(states[:, -completion.size(1) - 1 : -1], model.lm_head.weight, batch)

        found: Tensor = self.root(work)
        return found

    def norm_gradient(self) -> Tensor:
        gradient = self.root.model.model.norm.weight.grad
        return whole(gradient).double()

    def step(self, loss: Callable[..., Tensor]) -> Tensor:
        """A step with a loss that is a sum over this rank's tokens, over so many of all; returns its part."""
        self.optimizer.zero_grad()
        value: Tensor = self.loss(loss, self.batch | {"items": self.share * self.ranks})
        (value * self.ranks).backward()  # FSDP2 averages
        self.optimizer.step()
        return value.detach()


# Losses of (B, T, H) states and the head -------------------------------------------------------------------------


def loss_ours(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> Tensor:
    return linear_grpo_loss(
        hidden,
        weight,
        batch["completion_ids"],
        advantages=batch["advantages"],
        old_logps=batch["old_logps"],
        num_items_in_batch=batch["items"],
    ).loss


def _from_logps(logps: Tensor, batch: dict[str, Any]) -> Tensor:
    """The sum over tokens, in plain torch."""
    ratio, advantages = (logps - batch["old_logps"]).exp(), batch["advantages"][:, None]
    total: Tensor = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    return total


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]


def loss_eager(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> Tensor:
    items: int = batch["items"]
    return _from_logps(_chosen((hidden @ weight.T).float(), batch["completion_ids"]), batch) / items


def loss_trl(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> Tensor:
    """TRL's fused head, as under FSDP2 it would be called with a whole one."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    ids, rows = batch["completion_ids"], hidden.flatten(0, 1)
    items: int = batch["items"]
    logps = _ChunkedLogProbFunction.apply(
        rows, weight, None, ids.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]
    return _from_logps(logps.view(ids.shape), batch) / items


def _remember(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> Tensor:
    batch["old_logps"] = torch.cat([_exact_logps(*x) for x in _rows(hidden, weight, batch)]).float() + batch["noise"]
    return hidden


def _exact(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    parts = [checkpoint(_exact_logps, *x, use_reentrant=False) for x in _rows(hidden, weight, batch)]
    return _from_logps(torch.cat(parts), batch)


def _rows(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A sequence at a time, for what it takes in float64."""
    return [(h[None], weight, ids[None]) for h, ids in zip(hidden, batch["completion_ids"], strict=True)]


def _exact_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return _chosen(hidden.double() @ weight.double().T, ids)


def no_loss(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> Tensor:
    return hidden.float().mean()


# Measuring -------------------------------------------------------------------------------------------------------

STEP = Task(
    "a step",
    "without head and loss",
    (
        Provider("grpo_fast", lambda x: x.step(loss_ours), ours=True),
        Provider("TRL", lambda x: x.step(loss_trl)),
        Provider("torch eager", lambda x: x.step(loss_eager)),
    ),
    {"loss": 1e-3, "d norm": 0.1},
)


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    x = Inputs(case)
    losses, gradient = x.expected

    def errors(loss: Tensor) -> dict[str, float]:
        true = losses[0] if case.ranks == 1 else losses[dist.get_rank()]
        d_norm = x.norm_gradient()
        return {"loss": abs(loss.item() - true), "d norm": ((d_norm - gradient).norm() / gradient.norm()).item()}

    x.step(loss_ours)  # the optimizer's state is there, and belongs to nobody
    records = run_task(timer, case, STEP, x, ceiling=lambda: x.step(no_loss), takes_part=takes_part, errors=errors)
    tokens = x.batch["input_ids"].numel() * case.ranks
    return [r | {"tokens_per_second": tokens / r["ms"] * 1e3} if "ms" in r else r for r in merged(records)]


def title(case: dict[str, Any]) -> str:
    tokens = case["sequences"] * (case["prompt"] + case["completion"])
    gpus = f"{case['ranks']} GPU" + "s" * (case["ranks"] > 1)
    return f"{gpus}, {tokens:,} tokens each, of which {case['sequences'] * case['completion']:,} are completions"


def cases(ranks: int) -> tuple[Case, ...]:
    if DEVICE == "cpu":
        tiny = {
            "sequences": 2,
            "prompt": 3,
            "completion": 5,
            "hidden": 16,
            "intermediate": 32,
            "layers": 2,
            "heads": 2,
        }
        return tuple(Case(r, vocabulary=50, **tiny) for r in (1, ranks))
    return Case(1), Case(ranks)


BENCHMARK = Benchmark(
    name="fsdp",
    summary="a GRPO training step of a 1.5B-shaped model under FSDP2",
    notes=NOTES,
    cases=(Case(1), Case(2)),
    quick=(Case(2),),
    headline=Case(2),
    measure=measure,
    title=title,
    device=DEVICE,
    command="NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m grpo_fast.benchmarks.bench_distributed fsdp",
)
