"""A policy update of TRL's GRPOTrainer, forward to optimizer, as it ships and with its loss from hidden states."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast import GRPOLossConfig, linear_grpo_loss, linear_selective_log_softmax

from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, attempt, run_task

PROMPT = 128  # tokens
CHECKED_ROWS = 8192  # float64 takes its time
RUNS = 3  # an update takes seconds
GRAIN = 256  # tokens that the longest completion is known to
LONGEST = 32768
SEARCHED_ON_CPU = 2 * GRAIN
RESERVED = 2 * 2**30  # bytes that CUDA itself, cuBLAS and the kernels take beside torch's allocator, and more
NOTES = """\
Models of Qwen2.5's shapes with random weights and tokens, and SmolLM2-135M with its own weights on a text (the source
of torch.nn.functional); bfloat16, tied embeddings, scaled dot product attention. AdamW with a learning rate of 0,
prompts of 128 tokens, no padding; TRL's default options and its own `_compute_loss`, against the same trainer with
`FastGRPOTrainer`'s. "The rest" is the same update without a loss: forward and backward of the model below its head,
and the optimizer; the loss's share is what a step takes beyond it. Memory is beyond weights and optimizer, gradients
included. Activations are recomputed (`gradient_checkpointing`, TRL's default), but for the longest completion that
fits: there they are kept, and the allocator may not have more than so many GiB, weights, gradients and optimizer
included (or what a smaller GPU has, less 2 GiB for CUDA itself); lengths are tried in steps of 256 tokens, up to
32,768. Times are medians of three."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
#: Of Qwen2Config: what the models of random weights differ in.
SHAPES: dict[str, dict[str, int]] = {
    name: dict(zip(_SIZES, sizes, strict=True), num_key_value_heads=2)
    for name, sizes in {
        "Qwen2.5-0.5B": (151936, 896, 4864, 24, 14),
        "Qwen2.5-1.5B": (151936, 1536, 8960, 28, 12),
        "tiny": (48, 16, 32, 1, 2),
    }.items()
}
#: Models with weights of their own, by the name they are fetched under (``grpo-fast fetch``).
FETCHED = {"SmolLM2-135M": "smollm2-135m"}


@dataclass(frozen=True)
class Case:
    """An update; with a cap, the search for the longest completion that fits into so many GiB."""

    model: str = "Qwen2.5-0.5B"
    completion: int = 4096
    sequences: int = 4
    cap_gib: int | None = None


def title(case: dict[str, Any]) -> str:
    count = f"{case['sequences']} completion{'s' if case['sequences'] > 1 else ''}"
    if case["cap_gib"] is not None:
        return f"{case['model']}, {count}, {case['cap_gib']} GiB"
    return f"{case['model']}, {count} of {case['completion']:,} tokens"


BASE = Case()
QUICK = (BASE,)
FULL = (
    *(
        Case(name, completion, sequences)
        for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
        for completion, sequences in ((1024, 4), (4096, 4), (16384, 1))
    ),
    *(Case("SmolLM2-135M", completion) for completion in (1024, 4096)),
    *(Case(name, GRAIN, cap_gib=cap) for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B") for cap in (24, 48, 80)),
)


class Inputs:
    """A model with its optimizer, whose state is there, both trainers over it, and a batch."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model, self.text = make_model(case.model)
        self.model.train()
        if case.cap_gib is None:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=DEVICE == "cuda")
        self.trainers: dict[str, Any] = {}
        self.batch = self.make_batch(case.completion)
        self.update_without_loss()
        if case.cap_gib is None:
            logps = self.logps()
            self.batch["old_per_token_logps"] = logps + 0.1 * torch.randn_like(logps)

    def make_batch(self, length: int) -> dict[str, Tensor]:
        """What TRL's generation hands to the loss; the log-probs are of a policy that knows nothing."""
        shape, words = (self.case.sequences, length), self.model.config.vocab_size
        if self.text is None:
            ids = torch.randint(0, words, (shape[0], PROMPT + length), device=DEVICE)
        else:
            starts = torch.arange(shape[0], device=DEVICE)[:, None] * (len(self.text) // shape[0])
            ids = self.text[(starts + torch.arange(PROMPT + length, device=DEVICE)) % len(self.text)]
        return {
            "prompt_ids": ids[:, :PROMPT],
            "prompt_mask": torch.ones(shape[0], PROMPT, device=DEVICE, dtype=torch.long),
            "completion_ids": ids[:, PROMPT:],
            "completion_mask": torch.ones(shape, device=DEVICE, dtype=torch.long),
            "advantages": torch.randn(shape[0], device=DEVICE),
            "old_per_token_logps": torch.full(shape, -math.log(words), device=DEVICE),
            "num_items_in_batch": torch.tensor(shape[0] * length, device=DEVICE),
        }

    def hidden(self) -> Tensor:
        """The states that predict the completions' tokens."""
        b = self.batch
        ids, masks = (torch.cat([b[f"prompt_{x}"], b[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):  # as the trainers
            states: Tensor = self.model.base_model(input_ids=ids, attention_mask=masks).last_hidden_state
        return states[:, PROMPT - 1 : -1]

    def logps(self) -> Tensor:
        """The model's log-probs of the completions' tokens."""
        head, ids = self.model.lm_head.weight, self.batch["completion_ids"]
        with torch.no_grad():
            found = linear_selective_log_softmax(self.hidden(), head, ids)
        assert isinstance(found, Tensor)
        return found

    def trainer(self, name: str) -> Any:
        """TRL's, or ours, made when it is first asked for. Each patches the model, so each has a view of its own."""
        if name not in self.trainers:
            checkpointing = self.case.cap_gib is None
            self.trainers[name] = make_trainer(name, _view(self.model), self.folder, checkpointing)
        return self.trainers[name]

    def update(self, name: str) -> Tensor:
        """The loss, after forward, backward and optimizer."""
        trainer = self.trainer(name)
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(trainer.model, dict(self.batch))
        return self._finish(loss)

    def update_without_loss(self) -> Tensor:
        """The same, had the hidden states of the completions a gradient to begin with."""
        return self._finish(self.hidden().mean())

    def _finish(self, loss: Tensor) -> Tensor:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def truth(self) -> float:
        """The loss in float64, from the model's hidden states."""
        b = self.batch
        with torch.no_grad():
            return linear_grpo_loss(
                self.hidden().double(),
                self.model.lm_head.weight.double(),
                b["completion_ids"],
                advantages=b["advantages"],
                old_logps=b["old_per_token_logps"],
                config=GRPOLossConfig(loss_type="dapo"),
                impl="torch",
            ).loss.item()


def make_model(name: str) -> tuple[Any, Tensor | None]:
    """A model, and the tokens of a text if it has weights of its own.

    Raises:
        ValueError: Its weights are not fetched yet.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    options = dict(dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32, attn_implementation="sdpa")
    if name in FETCHED:
        from grpo_fast.train.fetch import model_folder

        folder = model_folder(FETCHED[name])
        words = AutoTokenizer.from_pretrained(folder)(inspect.getsource(torch.nn.functional))["input_ids"]
        return AutoModelForCausalLM.from_pretrained(folder, **options).to(DEVICE), torch.tensor(words, device=DEVICE)
    config = Qwen2Config(
        **SHAPES[name], max_position_embeddings=2 * LONGEST, tie_word_embeddings=True, use_cache=False
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, **options), None


def _view(model: Any) -> Any:
    """The same modules and parameters behind another object, whose forward can be replaced by itself."""
    view = copy.copy(model)
    view.__dict__.pop("forward", None)
    return view


def make_trainer(name: str, model: Any, folder: Path, checkpointing: bool) -> Any:
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
            gradient_checkpointing=checkpointing,
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
UPDATE = Task("a policy update", "the rest", PROVIDERS, {"loss": 1e-2})
FIT = "longest completion"


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    torch.manual_seed(0)
    gc.collect()  # trainers of the case before
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:

        def prepare() -> Record:
            x = Inputs(case, Path(folder))
            checked = case.cap_gib is None and case.sequences * case.completion <= CHECKED_ROWS
            return {"x": x, "expected": x.truth() if checked else None}

        prepared = attempt(prepare)
        if "skipped" in prepared:
            task = UPDATE.name if case.cap_gib is None else FIT
            return [_record(case, task, p) | prepared for p in PROVIDERS if takes_part(p)]
        x, expected = prepared["x"], prepared["expected"]
        if case.cap_gib is not None:
            return [_longest(x, provider, before) for provider in PROVIDERS if takes_part(provider)]

        def errors(loss: Any) -> dict[str, float]:
            return {"loss": abs(loss.item() - expected)}

        few = Timer(min(timer.runs, RUNS), warmup=1, device=timer.device)
        records = run_task(
            few,
            case,
            UPDATE,
            x,
            ceiling=x.update_without_loss,
            takes_part=takes_part,
            errors=None if expected is None else errors,
        )
    for record in records:
        if "ms" in record:
            record["columns"] = {"loss's share": f"{max(0.0, 1 - record['ceiling_ms'] / record['ms']):.0%}"}
    return records


def _record(case: Case, task: str, provider: Provider) -> Record:
    return {
        "case": asdict(case),
        "task": task,
        "provider": provider.name,
        "ours": provider.ours,
        "ceiling": UPDATE.ceiling,
    }


# The longest completion -------------------------------------------------------------------------------------------


def _longest(x: Inputs, provider: Provider, before: int = 0) -> Record:
    """By bisection; a length fits if an update does not run out of memory. 0: none does."""

    def fits(steps: int) -> bool:
        try:
            x.batch = x.make_batch(steps * GRAIN)
            provider.run(x)
        except torch.OutOfMemoryError:
            return False
        finally:
            x.optimizer.zero_grad(set_to_none=True)
            gc.collect()  # what ran out of memory may hold some in cycles
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        return True

    def search() -> Record:
        with capped(x.case.cap_gib, before):
            low, high = 0, (LONGEST if DEVICE == "cuda" else SEARCHED_ON_CPU) // GRAIN
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return {"tokens": low * GRAIN}

    return _record(x.case, FIT, provider) | attempt(search)


@contextmanager
def capped(gib: int | None, before: int) -> Iterator[None]:
    """Let torch's allocator have no more than so many GiB beside ``before`` bytes, or what a smaller GPU has."""
    if gib is None or DEVICE != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 + before, total - RESERVED) / total)
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
