"""GRPO with verl, from hidden states: the three settings that grpo_fast adds to any run of verl's.

    pip install "grpo_fast[verl]"
    python examples/verl_grpo.py algorithm.adv_estimator=grpo data.train_files=... actor_rollout_ref.model.path=...

Takes verl's own options, after these, and needs what verl needs.
"""

import runpy
import sys

SETTINGS = [
    # Every worker imports it, which puts our functions in place of verl's and registers the policy loss.
    "actor_rollout_ref.model.external_lib=grpo_fast.integrations.verl",
    # Models return log-probs and entropy, not logits.
    "actor_rollout_ref.model.use_fused_kernels=True",
    # verl's vanilla loss, by the definition that grpo_fast's ops have.
    "actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fast",
]

if __name__ == "__main__":
    sys.argv[1:1] = SETTINGS
    runpy.run_module("verl.trainer.main_ppo", run_name="__main__")
