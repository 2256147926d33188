"""The keys of the algorithms: `algorithm.*`, the actor's policy losses, penalties on the reward. See config.py."""

from dataclasses import dataclass
from typing import Literal

from hybridrl.config_leaf import key, node

Kl = Literal[
    "kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "mse+", "k2+", "low_var_kl+", "k3+"
]


@dataclass(frozen=True)
class PolicyLoss:
    loss_mode: str = key(
        "vanilla", "Policy loss by name (hybridrl.algorithms.policy_losses) or import path, package.module:function."
    )
    clip_cov_ratio: float = key(0.0002, "clip_cov: share of tokens whose gradient is dropped.")
    clip_cov_lb: float = key(1.0, "clip_cov: they are drawn from tokens with a covariance above this.")
    clip_cov_ub: float = key(5.0, "clip_cov: and below this.")
    kl_cov_ratio: float = key(0.0002, "kl_cov: share of tokens, those of the largest covariance, with a KL penalty.")
    ppo_kl_coef: float = key(1.0, "kl_cov: weight of that penalty.")
    dro_beta: float = key(0.1, "dro: weight of the squared log-ratio.")


@dataclass(frozen=True)
class KlCtrl:
    type: Literal["fixed", "adaptive"] = key("fixed", "Controller of the KL coefficient.")
    kl_coef: float = key(0.001, "Coefficient (fixed) or its first value (adaptive).")
    horizon: int = key(10000, "Samples over which the adaptive controller acts.")
    target_kl: float = key(0.1, "What the adaptive controller steers to.")


@dataclass(frozen=True)
class FilterGroups:
    enable: bool = key(False, "DAPO's dynamic sampling: drop prompts whose samples all score alike and generate more.")
    metric: str = key(
        "seq_final_reward",
        "What must differ: seq_final_reward or seq_reward, score (without the over-long penalty), or a number that the"
        " reward function returns, such as acc.",
    )
    max_num_gen_batches: int = key(0, "Most batches of data.train_batch_size prompts generated for a step (0: any).")


@dataclass(frozen=True)
class RolloutCorrection:
    rollout_is: Literal["token", "sequence"] | None = key(
        None, "Weigh the loss by trainer / rollout probability of each token or whole sequence. None: no weights."
    )
    rollout_is_threshold: str = key(
        "2.0", "C: weights are cut to C (TIS). lo_hi, as \"'0.5_5.0'\": weights outside are 0 (IcePop)."
    )
    rollout_is_batch_normalize: bool = key(False, "Divide the weights by their mean over the step.")
    rollout_rs: str | None = key(
        None, "Reject tokens or sequences: {token,seq_sum,seq_mean}_{k1,k2,k3}, seq_max_{k2,k3}, several with commas."
    )
    rollout_rs_threshold: str | None = key(
        None, "Bound of each: ratios lo_hi (or C for 1/C to C) for k1, the largest divergence for k2 and k3."
    )
    bypass_mode: bool = key(False, "The rollout's log-probs stand for the old ones; no old-log-prob pass.")
    loss_type: Literal["ppo_clip", "reinforce"] = key(
        "ppo_clip", "Loss of bypass_mode: vanilla on trainer / rollout, or the plain policy gradient with rollout_is."
    )


@dataclass(frozen=True)
class Algorithm:
    adv_estimator: str = key(
        "gae", "Advantage estimator by name (hybridrl.algorithms.advantages) or import path, package.module:function."
    )
    gamma: float = key(1.0, "Discount (gae, reinforce_plus_plus).")
    lam: float = key(1.0, "GAE's lambda.")
    norm_adv_by_std_in_grpo: bool = key(
        True, "grpo, grpo_passk, gdpo: divide by the group's standard deviation (false with grpo: Dr.GRPO)."
    )
    gdpo_reward_keys: list[str] = key([], "gdpo: numbers that the reward function returns beside score, one a part.")
    gdpo_reward_weights: list[float] | None = key(None, "gdpo: weight of each. None: 1.")
    use_kl_in_reward: bool = key(False, "Subtract a KL term against the reference from each token's reward.")
    kl_penalty: Kl = key("kl", "Its estimator.")
    kl_ctrl: KlCtrl = node(KlCtrl)
    filter_groups: FilterGroups = node(FilterGroups)
    rollout_correction: RolloutCorrection = node(RolloutCorrection)


@dataclass(frozen=True)
class OverlongBuffer:
    enable: bool = key(False, "DAPO's over-long penalty on training scores (validation is without).")
    len: int = key(128, "The penalty starts so many tokens before data.max_response_length and grows in a line.")
    penalty_factor: float = key(1.0, "Its size at data.max_response_length.")


@dataclass(frozen=True)
class RewardKwargs:
    overlong_buffer_cfg: OverlongBuffer = node(OverlongBuffer)
