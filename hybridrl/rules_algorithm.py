"""The rules between the algorithms' keys: estimators, policy losses, rollout correction, DAPO. Called by rules.check.

An option that the chosen estimator or loss does not read is a contradiction when it is set to anything but its default.
"""

from collections.abc import Iterator
from typing import Any

from hybridrl.config import PPOConfig, default, leaves
from hybridrl.resolution import own

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
ESTIMATOR, LOSS = "algorithm.adv_estimator", f"{ACTOR}.policy_loss.loss_mode"
CORRECTION, GROUPS = "algorithm.rollout_correction", "algorithm.filter_groups"
OVERLONG = "reward.reward_kwargs.overlong_buffer_cfg"

# Option -> key, for the options that estimators and losses declare.
ESTIMATOR_OPTIONS = {
    name: f"algorithm.{name}"
    for name in ("gamma", "lam", "norm_adv_by_std_in_grpo", "gdpo_reward_keys", "gdpo_reward_weights")
}
LOSS_OPTIONS = {
    name: f"{ACTOR}.{name}"
    for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
} | {
    name: f"{ACTOR}.policy_loss.{name}"
    for name in ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta")
}


def find_estimator(config: PPOConfig) -> Any:
    """The estimator that the configuration names, or None where there is none."""
    from hybridrl.algorithms import advantages

    try:
        return advantages.find(config.algorithm.adv_estimator)
    except ValueError:
        return None


def effective_loss(config: PPOConfig) -> tuple[str, Any]:
    """(what chose it, the policy loss) in force: in bypass mode rollout correction's. None where there is none."""
    from hybridrl.algorithms import policy_losses

    keys, name = config.algorithm.rollout_correction, config.actor_rollout_ref.actor.policy_loss.loss_mode
    chosen = f"{LOSS}={name}"
    if keys.bypass_mode:
        name = "reinforce" if keys.loss_type == "reinforce" else "vanilla"
        chosen = f"{CORRECTION}.loss_type={keys.loss_type}"
    try:
        return chosen, policy_losses.find(name)
    except ValueError:
        return chosen, None


def unread_options(config: PPOConfig) -> list[tuple[str, str]]:
    """(key, who does not read it) for each option that the user has set and the chosen estimator or loss ignores."""
    found = []
    estimator, (chosen, loss) = find_estimator(config), effective_loss(config)
    for who, what, options in (
        (f"{ESTIMATOR}={config.algorithm.adv_estimator}", estimator, ESTIMATOR_OPTIONS),
        (chosen, loss, LOSS_OPTIONS),
    ):
        if what is not None and what.options is not None:
            ignored = [key for name, key in options.items() if name not in what.options]
            found += [(key, who) for key in ignored if key in config.explicit]
    return found


def unread(config: PPOConfig) -> Iterator[str]:
    """Options set to a value of the user's own that nothing reads."""
    table = leaves(PPOConfig)
    for key, who in unread_options(config):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value != default(table[key]):
            yield f"{key}={value} has no effect with {who}; leave it out, or choose another"


def estimators(config: PPOConfig) -> Iterator[str]:
    """The estimator, its samples and its critic."""
    from hybridrl.algorithms import advantages

    algorithm, n, critic = config.algorithm, config.actor_rollout_ref.rollout.n, config.critic.enable
    name = algorithm.adv_estimator
    try:
        found = advantages.find(name)
    except ValueError as error:
        yield str(error).replace(f"unknown {ESTIMATOR} {name!r}", f"{ESTIMATOR}={name}")
        return
    if found.compares and n == 1:
        yield f"{ESTIMATOR}={name} compares a prompt's samples and {ROLLOUT}.n=1: set {ROLLOUT}.n to 2 or more"
    needs_critic = "values" in found.needs
    if needs_critic and critic is False:
        yield (
            f"critic.enable=false and {ESTIMATOR}={name}, which needs values; choose grpo or rloo, or leave it out"
        )
    if critic and not needs_critic:
        yield (
            f"critic.enable=true and {ESTIMATOR}={name}, which reads no values; choose gae, or leave critic.enable out"
        )
    if config.trainer.critic_warmup and not own(critic, needs_critic):
        yield f"trainer.critic_warmup={config.trainer.critic_warmup} and there is no critic ({ESTIMATOR}={name})"
    if not found.per_token:
        switches = {
            "algorithm.use_kl_in_reward": algorithm.use_kl_in_reward,
            f"{OVERLONG}.enable": config.reward.reward_kwargs.overlong_buffer_cfg.enable,
        }
        for key in [key for key, on in switches.items() if on]:
            yield f"{key}=true changes the score, and {ESTIMATOR}={name} reads its parts only; leave it out"
    if name == "gdpo":
        yield from _gdpo(algorithm)


def _gdpo(algorithm: Any) -> Iterator[str]:
    keys, weights = algorithm.gdpo_reward_keys, algorithm.gdpo_reward_weights
    if not keys:
        yield (
            f"{ESTIMATOR}=gdpo needs algorithm.gdpo_reward_keys: numbers that the reward function returns beside score"
        )
    elif weights is not None and len(weights) != len(keys):
        yield (
            f"algorithm.gdpo_reward_weights={weights} and algorithm.gdpo_reward_keys={keys}: one weight for each key"
        )


def losses(config: PPOConfig) -> Iterator[str]:
    """The policy loss and its aggregation."""
    from hybridrl.algorithms import policy_losses

    actor = config.actor_rollout_ref.actor
    name, bypass = actor.policy_loss.loss_mode, config.algorithm.rollout_correction.bypass_mode
    if name == "bypass_mode":
        yield f"{LOSS}=bypass_mode: set {CORRECTION}.bypass_mode=true and leave loss_mode out"
        return
    try:
        found = policy_losses.find(name)
    except ValueError as error:
        yield str(error).replace(f"unknown {LOSS} {name!r}", f"{LOSS}={name}")
        return
    if found.hidden:
        yield f"{LOSS}={name} belongs to {CORRECTION}.loss_type={name} with bypass_mode=true; else gpg is the same"
        return
    if bypass and name != "vanilla":
        yield (
            f"{LOSS}={name} and {CORRECTION}.bypass_mode=true, whose loss is {CORRECTION}.loss_type's; leave one of the"
            " two out"
        )
        return
    chosen, loss = effective_loss(config)
    key = f"{ACTOR}.loss_agg_mode"
    if loss.mode and key in config.explicit and actor.loss_agg_mode != loss.mode:
        yield (
            f"{key}={actor.loss_agg_mode} and {chosen}, which takes {loss.mode} by its definition; leave the first out"
        )
    if name == "clip_cov" and actor.policy_loss.clip_cov_lb >= actor.policy_loss.clip_cov_ub:
        yield (
            f"{ACTOR}.policy_loss.clip_cov_lb={actor.policy_loss.clip_cov_lb:g} is not below"
            f" clip_cov_ub={actor.policy_loss.clip_cov_ub:g}: no token lies between them"
        )


def correction(config: PPOConfig) -> Iterator[str]:
    """algorithm.rollout_correction."""
    from hybridrl.algorithms import correction as formulas

    keys = config.algorithm.rollout_correction
    try:
        if keys.rollout_is:
            formulas.is_bounds(keys.rollout_is_threshold)
        if keys.rollout_rs:
            formulas.rs_bounds(keys.rollout_rs, keys.rollout_rs_threshold)
    except ValueError as error:
        yield str(error)
    if not keys.bypass_mode:
        return
    if keys.rollout_is and keys.loss_type == "ppo_clip":
        yield (
            f"{CORRECTION}.rollout_is={keys.rollout_is} with bypass_mode=true and loss_type=ppo_clip: the loss's own"
            " ratio is the weight; leave it out, or choose loss_type=reinforce"
        )
    if keys.rollout_is and keys.rollout_is_batch_normalize:
        yield (
            f"{CORRECTION}.rollout_is_batch_normalize=true with bypass_mode=true: the mean of the current policy's"
            " weights is known only after every micro-batch; leave one of the two out"
        )
    found = find_estimator(config)
    if found and (needs := sorted(found.needs & {"old_logprobs", "sum_pi_squared"})):
        yield (
            f"{CORRECTION}.bypass_mode=true leaves out the pass that gives {ESTIMATOR}="
            f"{config.algorithm.adv_estimator} its {needs[-1]}; set bypass_mode=false"
        )


def dapo(config: PPOConfig) -> Iterator[str]:
    """Group filter and over-long penalty."""
    groups, n = config.algorithm.filter_groups, config.actor_rollout_ref.rollout.n
    if groups.enable and n == 1:
        yield f"{GROUPS}.enable=true compares a prompt's samples and {ROLLOUT}.n=1: set {ROLLOUT}.n to 2 or more"
    if groups.enable and config.algorithm.use_kl_in_reward and groups.metric == "seq_final_reward":
        yield (
            f"{GROUPS}.metric=seq_final_reward and algorithm.use_kl_in_reward=true: the KL term is known only after the"
            " filter; set metric=seq_reward"
        )
    buffer, longest = config.reward.reward_kwargs.overlong_buffer_cfg, config.data.max_response_length
    if buffer.enable and buffer.len > longest:
        yield f"{OVERLONG}.len={buffer.len} is more than data.max_response_length={longest}; lower it"


RULES = (estimators, losses, unread, correction, dapo)
