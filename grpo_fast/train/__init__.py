"""A thin GRPO loop: tasks, rewards, rollouts, updates by ``linear_grpo_loss``, evaluation, report."""
