"""Sampling by a vLLM server, behind the interface of ``rollout.sample``.

TRL's client speaks with the server: prompts and completions go over HTTP, weights over NCCL, or, from a trainer
without a GPU, by a file. An engine has kernels and a precision of its own, so the distribution that it samples from
is not quite the policy's. The loss is told of both: the trainer's own log-probs are the old ones of its ratio, and
its policy term is weighted by the importance ratio of the policy to the engine, truncated from above.

Run with a server of vLLM 0.31.0 on a CPU, weights by file (``tests/test_vllm_server.py``), by a whole run of GRPO and
by two ranks. The way over NCCL, and a server on a GPU, have only met a stand-in.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_fast.train.model import Policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.rollout import Rollout, pad_left
from grpo_fast.train.settings import Settings
from grpo_fast.train.update import reference_logps

#: How the server has to be started, after its model's name.
SERVE = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)


class Client(Protocol):
    """What is used of ``trl.generation.vllm_client.VLLMClient``."""

    def generate(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        """Completions, prompt by prompt, n of each: ``completion_ids`` and ``logprobs`` (per token a list of one)."""

    def update_model_params(self, model: Any) -> None:
        """Send all weights."""

    def reset_prefix_cache(self) -> None:
        """Forget keys and values that older weights made."""


def connect(server: str, policy: Policy, *, sends_weights: bool = True) -> Client:
    """A client of the vLLM server at an address such as ``http://localhost:8000``.

    One client of a server ``sends_weights``; another only asks for completions.

    Args:
        server: Its address.
        policy: The model that learns. From a GPU its weights go over NCCL, to another GPU; from a CPU by
            ``FileClient``.
        sends_weights: Whether this client will.

    Raises:
        ImportError: Without the package trl or vllm.
        ValueError: The server is not there, it does not report the log-probs of the distribution that it samples
            from, or it would go on sampling by old weights.
        RuntimeError: From TRL, which names what the server was started without.
    """
    missing = [name for name in ("trl", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"rollout='vllm' needs {' and '.join(missing)}: pip install 'grpo_fast[train,vllm]'")
    from trl.generation.vllm_client import VLLMClient

    try:
        client = VLLMClient(base_url=server)
    except OSError as error:
        raise ValueError(f"vllm_server: cannot reach {server}; want one started by: {SERVE}") from error
    info = client.get_server_info()
    mode = info["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(f"vllm_server: {server} has logprobs mode {mode!r}; want one started by: {SERVE}")
    if policy.device.type != "cuda":
        # vLLM 0.31.0 and 0.32.0 pack the head for the CPU once, and a load of tied embeddings does not pack it again.
        if info["device_config"]["device"] == "cpu" and policy.model.config.tie_word_embeddings:
            raise ValueError(
                "model: got one with tied embeddings, whose head a vLLM server on a CPU never takes anew; want an "
                "untied one, or a server on a GPU"
            )
        return FileClient(client)
    if sends_weights:
        client.init_communicator(policy.device)
    found: Client = client
    return found


class FileClient:
    """Sends weights as a file, in the folder for temporary ones (``TMPDIR``), which the server has to see too.

    Args:
        client: The one of TRL, for everything else.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.generate = client.generate
        self.reset_prefix_cache = client.reset_prefix_cache

    def update_model_params(self, model: Any) -> None:
        """Write the file, have the server load it, and delete it.

        Raises:
            ValueError: The server cannot load it, which ends a server of vLLM 0.31.0.
        """
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            order = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            try:
                self.client.session.post(f"{self.client.base_url}/collective_rpc", json=order).raise_for_status()
            except OSError as error:
                raise ValueError(
                    f"vllm_server: {self.client.base_url} cannot load weights from {folder}; want a server that sees "
                    "this folder and has a model of the policy's shape"
                ) from error


class VLLMSampler:
    """Samples by a server, which has the policy's weights whenever it is asked.

    Under torchrun every rank asks for its own completions; the first one sends the weights.

    Args:
        client: Of the server. On every rank but the first it need not be able to send weights.
        settings: ``vllm_importance_sampling_clip_max`` truncates the ratio; ``micro_prompts`` bounds the memory that
            the trainer's log-probs need.
        ranks: Those of the run.
    """

    def __init__(self, client: Client, settings: Settings, ranks: Ranks = ALONE) -> None:
        self.client, self.settings, self.ranks = client, settings, ranks

    def sample(
        self,
        policy: Policy,
        prompts: list[list[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """As ``rollout.sample``, but for ``logps`` and ``generator``.

        ``logps`` are the policy's own; ``importance_sampling_ratio`` compares them with the server's. The server
        draws by a generator of its own, so a run that was stopped does not go on with the same completions.

        Raises:
            ValueError: The server answers with another number of completions, or of log-probs, than was asked for.
        """
        if self.ranks.first:
            self.client.update_model_params(policy.model)
            self.client.reset_prefix_cache()
        self.ranks.wait()  # for the new weights, before any rank asks
        answer = self.client.generate(
            prompts,
            n=group_size,
            max_tokens=max_new_tokens,
            temperature=temperature,
            logprobs=0,  # those of the sampled tokens alone
            # Else it also ends at what the model's own generation_config.json names.
            generation_kwargs={"stop_token_ids": [policy.eos_id], "ignore_eos": True},
        )
        ids: list[list[int]] = answer["completion_ids"]
        # A log-prob that the server cannot give is None.
        logps = [[float("nan") if p[0] is None else p[0] for p in row] for row in answer["logprobs"]]
        if len(ids) != len(prompts) * group_size or [*map(len, ids)] != [*map(len, logps)]:
            raise ValueError(
                f"vllm_server: got {len(ids)} completions with {sum(map(len, ids))} tokens and "
                f"{sum(map(len, logps))} log-probs, want {len(prompts) * group_size} and a log-prob for each token"
            )
        prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id, policy.device)
        completion_ids, mask = _pad_right(ids, policy.pad_id, policy.device)
        sampling_logps, _ = _pad_right(logps, 0.0, policy.device)
        ended = torch.tensor([row[-1:] == [policy.eos_id] for row in ids], device=policy.device)
        batch = Rollout(
            prompt_ids=prompt_ids.repeat_interleave(group_size, 0),
            prompt_mask=prompt_mask.repeat_interleave(group_size, 0),
            completion_ids=completion_ids,
            completion_mask=mask,
            logps=sampling_logps,
            texts=[policy.decode(row) for row in completion_ids.cpu()],
            truncated=~ended & (mask.sum(1) >= max_new_tokens),
        )
        own = reference_logps(policy, batch, replace(self.settings, temperature=temperature))
        clip = self.settings.vllm_importance_sampling_clip_max
        return replace(batch, logps=own, importance_sampling_ratio=truncated_ratio(own, sampling_logps, clip))


def truncated_ratio(logps: Tensor, sampling_logps: Tensor, clip_max: float) -> Tensor:
    """``min(exp(logps - sampling_logps), clip_max)``, token by token; 1 where the sampler's log-prob is NaN.

    ``vllm_importance_sampling_mode="token_truncate"`` of TRL.
    """
    return (logps - sampling_logps).nan_to_num(nan=0.0).exp().clamp(max=clip_max)


def _pad_right(rows: list[Any], fill: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of numbers as one tensor (B, T), padded on the right, and its mask."""
    width = max(map(len, rows))
    mask = torch.arange(width, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device), mask
