"""GRPO with TRL on a toy task, from hidden states: the one line that differs from TRL is marked.

    pip install "grpo_fast[trl]"
    python examples/trl_grpo.py

Runs offline on a CPU in under a minute: a tiny Llama, made here, learns to answer with large digits.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from grpo_fast.integrations.trl import FastGRPOTrainer as GRPOTrainer  # was: from trl import GRPOTrainer

TOKENS = ["<pad>", "<eos>", *"0123456789+="]


def make_model(folder: Path) -> None:
    """A tokenizer of characters and a Llama of random weights, saved where TRL looks for them."""
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def mean_digit(completions: list[str], **_: object) -> list[float]:
    """The reward: the mean of the digits in an answer, between 0 and 1."""
    return [sum(int(c) for c in text if c.isdigit()) / (9 * max(len(text), 1)) for text in completions]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=mean_digit,
            args=GRPOConfig(
                output_dir=str(folder / "run"),
                num_generations=8,
                max_completion_length=8,
                per_device_train_batch_size=16,
                max_steps=30,
                learning_rate=3e-3,
                beta=0.01,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(10) for b in range(10)]}),
        )
        trainer.train()
        rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        print(f"mean reward: {rewards[0]:.2f} in the first five steps, {rewards[-1]:.2f} in the last")


if __name__ == "__main__":
    main()
