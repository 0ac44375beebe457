"""A policy update of TRL's GRPOTrainer, forward to optimizer, as it ships and with its loss from hidden states."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast import GRPOLossConfig, linear_grpo_loss

from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, attempt, run_task

PROMPT = 128  # tokens
CHECKED_ROWS = 8192  # float64 takes its time
RUNS = 3  # an update takes seconds
GRAIN = 256  # tokens that the longest completion is known to
LONGEST = 32768
SEARCHED_ON_CPU = 2 * GRAIN
NOTES = """\
Models of Qwen2.5's shapes (transformers, bfloat16, random weights, tied embeddings, scaled dot product attention),
AdamW with a learning rate of 0, 4 sequences with prompts of 128 tokens and without padding; TRL's default options and
its own `_compute_loss`, against the same trainer with `FastGRPOTrainer`'s. "The rest" is the same update
without a loss: forward and backward of the model below its head, and the optimizer. So the loss's share of a step is
1 - 1 / x. Memory is beyond weights and optimizer. Activations are recomputed (`gradient_checkpointing`, TRL's
default), but for the longest completion that fits: there they are kept, and the allocator may not have more than so
many GiB, weights, gradients and optimizer included (or what a smaller GPU has); lengths are tried in steps of 256
tokens, up to 32,768. Times are medians of three."""

#: Of Qwen2Config: what the two models differ in.
SHAPES: dict[str, dict[str, int]] = {
    "Qwen2.5-0.5B": dict(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "Qwen2.5-1.5B": dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "tiny": dict(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    ),
}


@dataclass(frozen=True)
class Case:
    """An update; with a cap, the search, from this length on, for the longest that fits into so many GiB."""

    model: str = "Qwen2.5-0.5B"
    completion: int = 4096
    sequences: int = 4
    cap_gib: int | None = None


def title(case: dict[str, Any]) -> str:
    if case["cap_gib"] is not None:
        return f"{case['model']}, {case['sequences']} completions, {case['cap_gib']} GiB"
    return f"{case['model']}, {case['sequences']} completions of {case['completion']:,} tokens"


BASE = Case()
QUICK = (replace(BASE, completion=1024), BASE)
FULL = tuple(
    case
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
    for case in (
        *(Case(name, completion) for completion in (1024, 4096, 16384)),
        *(Case(name, GRAIN, cap_gib=cap) for cap in (24, 48, 80)),
    )
)


class Inputs:
    """A model with its optimizer, both trainers over it, and a batch."""

    def __init__(self, case: Case, folder: Path) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            **SHAPES[case.model], max_position_embeddings=2 * LONGEST, tie_word_embeddings=True, use_cache=False
        )
        self.case, self.folder = case, folder
        with torch.device(DEVICE):
            self.model = Qwen2ForCausalLM(config)
        self.model.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32).train()
        if case.cap_gib is None:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=DEVICE == "cuda")
        self.trainers: dict[str, Any] = {}
        self.batch = self.make_batch(case.completion)

    def make_batch(self, length: int) -> dict[str, Tensor]:
        """What TRL's generation hands to the loss."""
        shape = (self.case.sequences, length)
        words = self.model.config.vocab_size
        old = -torch.tensor(float(words)).log().item() + 0.1 * torch.randn(shape, device=DEVICE)
        return {
            "prompt_ids": torch.randint(0, words, (shape[0], PROMPT), device=DEVICE),
            "prompt_mask": torch.ones(shape[0], PROMPT, device=DEVICE, dtype=torch.long),
            "completion_ids": torch.randint(0, words, shape, device=DEVICE),
            "completion_mask": torch.ones(shape, device=DEVICE, dtype=torch.long),
            "advantages": torch.randn(shape[0], device=DEVICE),
            "old_per_token_logps": old,
            "num_items_in_batch": torch.tensor(shape[0] * length, device=DEVICE),
        }

    def trainer(self, name: str) -> Any:
        """TRL's, or ours, made when it is first asked for. Each patches the model, so each has a view of its own."""
        if name not in self.trainers:
            self.trainers[name] = make_trainer(name, _view(self.model), self.folder)
        return self.trainers[name]

    def update(self, name: str) -> Tensor:
        """The loss, after forward, backward and optimizer."""
        trainer = self.trainer(name)
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(trainer.model, dict(self.batch))
        return self._finish(loss)

    def update_without_loss(self) -> Tensor:
        """The same, had the hidden states of the completions a gradient to begin with."""
        b = self.batch
        ids, masks = (torch.cat([b[f"prompt_{x}"], b[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        hidden = self.model.base_model(input_ids=ids, attention_mask=masks).last_hidden_state
        return self._finish(hidden[:, PROMPT - 1 : -1].mean())

    def _finish(self, loss: Tensor) -> Tensor:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def truth(self) -> float:
        """The loss in float64, from the model's hidden states."""
        b = self.batch
        ids = torch.cat([b["prompt_ids"], b["completion_ids"]], 1)
        with torch.no_grad():
            hidden = self.model.base_model(input_ids=ids).last_hidden_state[:, PROMPT - 1 : -1]
            return linear_grpo_loss(
                hidden.double(),
                self.model.lm_head.weight.double(),
                b["completion_ids"],
                advantages=b["advantages"],
                old_logps=b["old_per_token_logps"],
                config=GRPOLossConfig(loss_type="dapo"),
                impl="torch",
            ).loss.item()


def _view(model: Any) -> Any:
    """The same modules and parameters behind another object, whose forward can be replaced by itself."""
    view = copy.copy(model)
    view.__dict__.pop("forward", None)
    return view


def make_trainer(name: str, model: Any, folder: Path) -> Any:
    """A trainer with TRL's default options, whose data and rewards are not used."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from grpo_fast.integrations.trl import FastGRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    trainer = {"TRL": GRPOTrainer, "grpo_fast": FastGRPOTrainer}[name](
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder),
            report_to=[],
            use_cpu=DEVICE == "cpu",
            bf16=DEVICE == "cuda",
            gradient_checkpointing=model.is_gradient_checkpointing,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1"] * 8}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


PROVIDERS = (
    Provider("grpo_fast", lambda x: x.update("grpo_fast"), ours=True),
    Provider("TRL", lambda x: x.update("TRL")),
)
UPDATE = Task("a policy update", "the rest", PROVIDERS, {"loss": 1e-3})
FIT = "longest completion"


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        x = Inputs(case, Path(folder))
        x.update_without_loss()  # from now on the optimizer's state is there
        if case.cap_gib is not None:
            return [_longest(x, provider) for provider in PROVIDERS if takes_part(provider)]
        errors = None
        if case.sequences * case.completion <= CHECKED_ROWS:
            expected = x.truth()

            def errors(loss: Any) -> dict[str, float]:
                return {"loss": abs(loss.item() - expected)}

        few = Timer(min(timer.runs, RUNS), warmup=1, device=timer.device)
        return run_task(few, case, UPDATE, x, ceiling=x.update_without_loss, takes_part=takes_part, errors=errors)


# The longest completion -------------------------------------------------------------------------------------------


def _longest(x: Inputs, provider: Provider) -> Record:
    """By bisection; a length fits if an update does not run out of memory. 0: none does."""
    record: Record = {"case": asdict(x.case), "task": FIT, "provider": provider.name, "ours": provider.ours}

    def fits(steps: int) -> bool:
        x.batch = x.make_batch(steps * GRAIN)
        try:
            provider.run(x)
        except torch.OutOfMemoryError:
            return False
        finally:
            x.optimizer.zero_grad(set_to_none=True)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        return True

    def search() -> Record:
        with capped(x.case.cap_gib):
            low, high = 0, (LONGEST if DEVICE == "cuda" else SEARCHED_ON_CPU) // GRAIN
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return {"tokens": low * GRAIN}

    return record | {"ceiling": UPDATE.ceiling} | attempt(search)


@contextmanager
def capped(gib: int | None) -> Iterator[None]:
    """Let torch's allocator have no more than so many GiB, or, of a smaller GPU, what there is."""
    if gib is None or DEVICE != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


BENCHMARK = Benchmark(
    name="trl-step",
    summary="a policy update of TRL's GRPOTrainer, and the longest completion that fits",
    notes=NOTES,
    cases=FULL,
    quick=QUICK,
    headline=BASE,
    measure=measure,
    title=title,
)
