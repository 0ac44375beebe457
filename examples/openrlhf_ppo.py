"""RL with OpenRLHF, without logits in fp32: its own command, in workers that are patched when they start.

    pip install "grpo_fast[openrlhf]"
    python examples/openrlhf_ppo.py --actor.model_name_or_path ... --algo.advantage.estimator group_norm ...

Takes the options of openrlhf.cli.train_ppo_ray, and needs what OpenRLHF needs.
"""

import runpy

import ray

RUNTIME_ENV = {
    "worker_process_setup_hook": "grpo_fast.integrations.openrlhf.patch_openrlhf",
    # What OpenRLHF asks for when it starts Ray itself.
    "env_vars": {
        "TOKENIZERS_PARALLELISM": "true",
        "NCCL_DEBUG": "WARN",
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    },
}

if __name__ == "__main__":
    ray.init(runtime_env=RUNTIME_ENV)
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
