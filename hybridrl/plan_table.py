"""The resolved plan of a run as rows for people: what will be done, on which ranks, in which sizes."""

from fnmatch import fnmatchcase
from typing import Any

from hybridrl import rules_algorithm
from hybridrl.config import Actor
from hybridrl.resolution import Resolved, ResolvedSFT, Role


def plan_rows(resolved: Resolved | ResolvedSFT) -> list[tuple[str, str]]:
    """The plan as (what, how much), printed at the start."""
    return _sft_rows(resolved) if isinstance(resolved, ResolvedSFT) else _ppo_rows(resolved)


def _ppo_rows(resolved: Resolved) -> list[tuple[str, str]]:
    unused = unused_keys(resolved)
    return [
        ("run folder", resolved.config.trainer.default_local_dir),
        ("machine", _machine(resolved)),
        *_batch_rows(resolved),
        *_role_rows(resolved),
        ("steps", _steps(resolved)),
        *([("set, not used in this run", ", ".join(unused))] if unused else []),
    ]


def _batch_rows(resolved: Resolved) -> list[tuple[str, str]]:
    config, batch = resolved.config, resolved.batch
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    n = rollout.n
    rows = [
        (
            "algorithm",
            f"{config.algorithm.adv_estimator}, policy loss {actor.policy_loss.loss_mode}, {actor.loss_agg_mode}",
        ),
        ("step", f"{batch.prompts} prompts x {n} = {batch.samples} samples"),
        (
            "mini-batch",
            (
                f"{batch.mini_batch_prompts} prompts x {n} = {batch.mini_batch_samples} samples, "
                f"{_per_rank(batch.mini_batch_samples, resolved.actor)}"
            ),
        ),
        ("actor updates a step", _updates(batch.mini_batches, actor.ppo_epochs)),
    ]
    if resolved.critic:
        rows.append(("critic updates a step", _updates(batch.critic_mini_batches, config.critic.ppo_epochs)))
    return rows + [
        ("micro-batch", _cut(actor, actor.ppo_max_token_len_per_gpu)),
        ("log-prob pass", _cut(actor, rollout.log_prob_max_token_len_per_gpu)),
        ("lengths", f"prompt up to {config.data.max_prompt_length}, response up to {config.data.max_response_length}"),
    ]


def _cut(actor: Actor, budget: int) -> str:
    return f"up to {budget} tokens" if actor.use_dynamic_bsz else f"{actor.ppo_micro_batch_size_per_gpu} samples"


def _updates(mini_batches: int, epochs: int) -> str:
    return f"{mini_batches} mini-batches x {epochs} epochs = {mini_batches * epochs} optimizer steps"


def _role_rows(resolved: Resolved) -> list[tuple[str, str]]:
    rollout, estimator = resolved.config.actor_rollout_ref.rollout, resolved.config.algorithm.adv_estimator
    no_critic = f"none: algorithm.adv_estimator={estimator} needs no values"
    rows = [
        ("actor", _role(resolved.actor)),
        ("critic", _role(resolved.critic) if resolved.critic else no_critic),
        ("reference", _role(resolved.ref) if resolved.ref else "none: no KL term asked for"),
        ("rollout", _rollout(resolved)),
    ]
    share = rollout.gpu_memory_utilization
    if resolved.machine.device != "cpu":
        return [*rows, ("KV cache", f"within {share:.0%} of each GPU (rollout.gpu_memory_utilization)")]
    key = "actor_rollout_ref.rollout.cpu_kvcache_gib"
    return rows + [
        ("KV cache", f"{rollout.cpu_kvcache_gib:g} GiB an engine ({key})"),
        ("gpu_memory_utilization", f"{share:g}: not applicable on CPU (KV cache: {key})"),
    ]


def _machine(resolved: Resolved | ResolvedSFT) -> str:
    machine = resolved.machine
    here = f"{machine.gpus} GPUs, " if machine.gpus else ""
    return f"{machine.device} ({here}{machine.cores} cores, {machine.memory_gib:.0f} GiB)"


def _per_rank(samples: int, role: Role) -> str:
    if samples % role.dp == 0:
        return f"{samples // role.dp} a data-parallel rank"
    return f"{samples // role.dp} or {samples // role.dp + 1} a data-parallel rank"


def _role(role: Role) -> str:
    virtual = f" (VPP {role.vpp})" if role.vpp > 1 else ""
    split = f"TP {role.tp} x PP {role.pp}{virtual} x DP {role.dp}"
    split += ", sequence parallel" if role.sequence_parallel else ""
    return f"{role.ranks} ranks = {split}, {role.dtype}" + ("" if role.colocated else ", a pool of its own")


def _rollout(resolved: Resolved) -> str:
    plan, rollout = resolved.rollout, resolved.config.actor_rollout_ref.rollout
    engines = f"{plan.replicas} vLLM engine{'s' if plan.replicas > 1 else ''} x TP {plan.tp}"
    place = "with the actor" if plan.colocated else "a pool of its own"
    return f"{engines}, {rollout.dtype}, up to {rollout.max_model_len} tokens a sequence, {place}"


def _steps(resolved: Resolved) -> str:
    batch = resolved.batch
    if batch.total_steps is not None:
        return f"{batch.total_steps} ({batch.steps_per_epoch} an epoch)"
    if batch.total_training_steps is not None:
        return str(batch.total_training_steps)
    return f"{batch.total_epochs} epochs"


def unused_keys(resolved: Resolved) -> list[str]:
    """Keys that the user has set and that this run does not need, because a switch elsewhere is off. Scripts set them
    while trying variants, so they are said rather than refused."""
    config, cpu = resolved.config, resolved.machine.device == "cpu"
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    off = []
    if not resolved.critic:
        off += ["critic.[!e]*"]
    if not resolved.ref:
        off += ["actor_rollout_ref.ref.*"]
    if not actor.use_dynamic_bsz:
        off += ["*max_token_len_per_gpu"]
    if not actor.use_kl_loss:
        off += ["*.actor.kl_loss_*"]
    if not algorithm.use_kl_in_reward:
        off += ["algorithm.kl_ctrl.*", "algorithm.kl_penalty"]
    elif algorithm.kl_ctrl.type == "fixed":
        off += ["algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"]
    off += [key for key, _ in rules_algorithm.unread_options(config)]
    off += _switched_off(config)
    if not config.data.val_files:
        off += ["*.val_kwargs.*", "trainer.val_before_train", "trainer.log_val_generations", "data.val_max_samples"]
    if cpu:
        off += ["*.free_cache_engine", "*.enable_chunked_prefill", "*.grad_offload", "*.optimizer_offload"]
    else:
        off += ["*.cpu_kvcache_gib", "trainer.cpu_ranks_max"]
    if config.trainer.executor != "ray":
        off += ["ray_kwargs.*"]
    return sorted(key for key in config.explicit if any(fnmatchcase(key, pattern) for pattern in off))


def _switched_off(config: Any) -> list[str]:
    """Patterns of the algorithm's keys whose switch is off."""
    keys, off = config.algorithm.rollout_correction, []
    if not config.algorithm.filter_groups.enable:
        off += ["algorithm.filter_groups.[!e]*"]
    if not keys.rollout_is:
        off += ["*.rollout_is_threshold", "*.rollout_is_batch_normalize"]
    if not keys.rollout_rs:
        off += ["*.rollout_rs_threshold"]
    if not keys.bypass_mode:
        off += ["*.rollout_correction.loss_type"]
    if not config.reward.reward_kwargs.overlong_buffer_cfg.enable:
        off += ["*.overlong_buffer_cfg.len", "*.overlong_buffer_cfg.penalty_factor"]
    return off


def _sft_rows(resolved: ResolvedSFT) -> list[tuple[str, str]]:
    config = resolved.config
    steps = config.trainer.total_training_steps
    return [
        ("run folder", config.trainer.default_local_dir),
        ("machine", _machine(resolved)),
        ("step", f"{config.data.train_batch_size} samples, {_per_rank(config.data.train_batch_size, resolved.actor)}"),
        ("micro-batch", f"up to {config.data.max_token_len_per_gpu} tokens"),
        ("lengths", f"up to {config.data.max_length} tokens"),
        ("model", _role(resolved.actor)),
        ("steps", f"{config.trainer.total_epochs} epochs" if steps is None else str(steps)),
    ]
