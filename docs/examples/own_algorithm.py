"""An estimator, a policy loss and a reward of one's own, chosen by import path:

algorithm.adv_estimator=own_algorithm:median_baseline
actor_rollout_ref.actor.policy_loss.loss_mode=own_algorithm:soft_clip
custom_reward_function.path=own_algorithm:short_and_right
"""

import torch


def median_baseline(inputs):
    """A = R minus the median score of the batch, at every token that counts."""
    scores = torch.segment_reduce(inputs.token_rewards, "sum", offsets=inputs.cu_resp.long(), initial=0)
    per_token = torch.repeat_interleave(scores - scores.median(), inputs.cu_resp.diff())
    advantages = per_token * inputs.response_mask
    return advantages, advantages


def soft_clip(inputs):
    """-A tanh(log rho): the ratio's pull fades with its distance. One number a token, unreduced, and metrics alike."""
    return -inputs.advantages * torch.tanh(inputs.log_ratio), {"actor/ppo_kl": -inputs.log_ratio}


def short_and_right(data_source, solution_str, ground_truth, extra_info=None):
    """1 for the right answer, plus a little for being short."""
    return {"score": float(ground_truth in solution_str) + 1 / (9 + len(solution_str)), "length": len(solution_str)}
