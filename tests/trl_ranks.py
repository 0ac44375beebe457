"""What a rank does for test_integration_trl.py: TRL's trainer as it is, with our loss, and patched.

torchrun --nproc-per-node 2 trl_ranks.py train|shard FOLDER OPTIONS writes what it finds to FOLDER/ranks.json.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
import trl
from test_integration_trl import make_batch, make_distillation, make_trainer
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_fast.integrations.trl import FastGRPOTrainer, patch_trl, unpatch_trl


def make(name: str, folder: Path, distills: bool = False, model: Any = None, **options: Any) -> Any:
    (patch_trl if name == "patched" else unpatch_trl)()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if distills:
        return make_distillation(0.3, folder, tokenizer, **options)
    return make_trainer(FastGRPOTrainer if name == "ours" else trl.GRPOTrainer, folder, tokenizer, model, **options)


def train(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """(logs, the sum of every weight) by the name of the trainer, under DDP or, with ``deepspeed``, ZeRO-3."""
    found = {}
    distills = options.pop("distills", False)
    for name in ("TRL", "patched") if distills else ("TRL", "ours", "patched"):
        trainer = make(name, folder, distills, max_steps=4, **options)
        trainer.train()
        logs = [
            {k: v for k, v in log.items() if not any(word in k for word in ("time", "second", "profiling"))}
            for log in trainer.state.log_history
        ]
        parameters, whole = list(trainer.model.parameters()), nullcontext()
        if "deepspeed" in options:
            import deepspeed

            assert all(p.numel() == 0 for p in parameters)
            whole = deepspeed.zero.GatheredParameters(parameters)
        with whole:
            found[name] = logs, [p.double().sum().item() for p in parameters]
    return found


def shard(folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """What each case finds, by its name."""
    return {name: shard_one(folder, **options) for name, options in cases.items()}


def shard_one(folder: Path, tied: bool, head_alone: bool) -> dict[str, Any]:
    """(loss, gradients averaged over ranks) by the name of the trainer: TRL's in one piece, and all under FSDP2.

    Of one micro-batch, by hand: on a CPU, accelerate knows DDP only.
    """
    found = {}
    for name in ("in one piece", "TRL", "ours", "patched"):
        model = LlamaForCausalLM.from_pretrained(folder, tie_word_embeddings=tied)
        trainer = make(name, folder, model=model, model_init_kwargs=None, beta=0.1, gradient_checkpointing=False)
        trainer.current_gradient_accumulation_steps = 1
        if name != "in one piece":
            for module in (*model.model.layers, *([model.lm_head] if head_alone else []), model):
                fully_shard(module)
        model.train()
        batch = make_batch((6, 1))
        del batch["sampling_per_token_logps"], batch["importance_sampling_ratio"]  # which vLLM brings
        rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
        loss = trainer._compute_loss(model, {k: x[rows] if x.dim() else x for k, x in batch.items()})
        loss.backward()
        dist.all_reduce(loss := loss.detach(), dist.ReduceOp.SUM)
        gradients = []
        for p in model.parameters():
            if name == "in one piece":
                dist.all_reduce(p.grad)
                gradients.append((p.grad / 2).tolist())
            else:
                gradients.append(p.grad.full_tensor().tolist())
        found[name] = loss.item() / 2, gradients
    return found


if __name__ == "__main__":
    task, folder = {"train": train, "shard": shard}[sys.argv[1]], Path(sys.argv[2])
    results = task(folder, json.loads(sys.argv[3]))
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        (folder / "ranks.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
