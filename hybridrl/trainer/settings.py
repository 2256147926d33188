"""What each part of the system is given, as pure functions of the resolved configuration.

One function a consumer. Nothing else reads the configuration tree on their behalf, so a key that changes none of these
changes nothing (tests/cpu/test_config_liveness.py).
"""

from dataclasses import replace
from typing import Literal

from hybridrl.algorithms import advantages as estimators
from hybridrl.algorithms import policy_losses
from hybridrl.algorithms.correction import Correction
from hybridrl.config import Data, SFTConfig
from hybridrl.megatron.engine import EngineSettings
from hybridrl.megatron.losses import ActorLoss, CriticLoss
from hybridrl.resolution import Resolved, Role
from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.rollout.server import ServerSettings
from hybridrl.trainer.batches import Pass
from hybridrl.trainer.generation import GenerationSettings, GroupFilter, Overlong
from hybridrl.trainer.worker import PoolSettings

_ACTOR_BUDGET = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"


def pools(resolved: Resolved, total_steps: int) -> dict[str, PoolSettings]:
    """The pools of training ranks by name: `actor`, and `critic` and `ref` where trainer.placement sets them apart."""
    if resolved.config.trainer.debug == "rollout":
        return {}
    engines = {"actor": {"actor": actor_engine(resolved, total_steps)}}
    if resolved.critic:
        engines.setdefault(pool_of(resolved, "critic"), {})["critic"] = critic_engine(resolved, total_steps)
    if resolved.ref:
        engines.setdefault(pool_of(resolved, "ref"), {})["ref"] = ref_engine(resolved)
    role: dict[str, Role | None] = {"actor": resolved.actor, "critic": resolved.critic, "ref": resolved.ref}
    seed = resolved.config.actor_rollout_ref.actor.megatron.seed
    ranks_here = min(sum(role[name].ranks for name in engines), resolved.machine.cores)
    threads = max(1, resolved.machine.cores // ranks_here) if resolved.machine.device == "cpu" else 4
    return {
        name: PoolSettings(
            device=resolved.machine.device,
            world=role[name].ranks,
            tp=role[name].tp,
            pp=role[name].pp,
            seed=resolved.config.critic.megatron.seed if name == "critic" else seed,
            engines=engines[name],
            threads=threads,
        )
        for name in engines
    }


def recorded(resolved: Resolved) -> bool:
    """Whether the run trains on tables of an earlier run, without a rollout engine."""
    return resolved.config.trainer.debug in ("train", "replay")


def sleeps(resolved: Resolved) -> bool:
    """Whether the rollout engine gives its device memory to the trainer and back."""
    return resolved.config.actor_rollout_ref.rollout.free_cache_engine and resolved.rollout.colocated


def pool_of(resolved: Resolved, role: str) -> str:
    """The pool a role lives in."""
    return "actor" if {"critic": resolved.critic, "ref": resolved.ref}[role].colocated else role


def actor_engine(resolved: Resolved, total_steps: int) -> EngineSettings:
    arr = resolved.config.actor_rollout_ref
    warm = resolved.config.trainer.critic_warmup
    return EngineSettings(
        role="policy",
        model_path=arr.model.path,
        megatron=arr.actor.megatron,
        optim=arr.actor.optim,
        total_steps=max(total_steps - warm, 1) * resolved.batch.actor_optimizer_steps,
        temperature=arr.rollout.temperature,
        trust_remote_code=arr.model.trust_remote_code,
    )


def ref_engine(resolved: Resolved) -> EngineSettings:
    arr = resolved.config.actor_rollout_ref
    return EngineSettings(
        role="policy",
        model_path=arr.model.path,
        megatron=arr.ref.megatron,
        optim=None,
        temperature=arr.rollout.temperature,
        trust_remote_code=arr.model.trust_remote_code,
    )


def critic_engine(resolved: Resolved, total_steps: int) -> EngineSettings:
    critic = resolved.config.critic
    return EngineSettings(
        role="value",
        model_path=critic.model.path,
        megatron=critic.megatron,
        optim=critic.optim,
        total_steps=total_steps * resolved.batch.critic_optimizer_steps,
        trust_remote_code=critic.model.trust_remote_code,
    )


def passes(resolved: Resolved) -> dict[str, Pass]:
    """How each pass cuts the samples: old, actor, and critic and ref where there are such."""
    arr, critic = resolved.config.actor_rollout_ref, resolved.config.critic
    actor = arr.actor
    micro = None if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu
    seed = actor.data_loader_seed if actor.shuffle else None
    base = dict(
        mini_batch_prompts=actor.ppo_mini_batch_size, epochs=actor.ppo_epochs, micro_batch_size=micro, shuffle_seed=seed
    )
    rollout_budget = "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"
    found = {
        "actor": Pass(
            "actor", "actor", max_tokens=actor.ppo_max_token_len_per_gpu, max_tokens_key=_ACTOR_BUDGET, **base
        ),
        "old": Pass(
            "actor",
            "actor",
            max_tokens=arr.rollout.log_prob_max_token_len_per_gpu,
            max_tokens_key=rollout_budget,
            **base,
        ),
    }
    if resolved.ref:
        budget = "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
        found["ref"] = Pass(
            pool_of(resolved, "ref"),
            "ref",
            max_tokens=arr.ref.log_prob_max_token_len_per_gpu,
            max_tokens_key=budget,
            **base,
        )
    if resolved.critic:
        found["critic"] = Pass(
            pool_of(resolved, "critic"),
            "critic",
            critic.ppo_mini_batch_size,
            critic.ppo_epochs,
            critic.ppo_max_token_len_per_gpu,
            "critic.ppo_max_token_len_per_gpu",
            micro,
            seed,
        )
    return found


def loss_mode(resolved: Resolved) -> str:
    """The policy loss: loss_mode, or what rollout correction's bypass mode puts in its place."""
    if bypass(resolved):
        loss_type = resolved.config.algorithm.rollout_correction.loss_type
        return {"ppo_clip": "vanilla", "reinforce": "reinforce"}[loss_type]
    return resolved.config.actor_rollout_ref.actor.policy_loss.loss_mode


def actor_loss(resolved: Resolved) -> ActorLoss:
    actor = resolved.config.actor_rollout_ref.actor
    columns = sorted(policy_losses.find(loss_mode(resolved)).needs)
    corrected = correction(resolved)
    if corrected and corrected.rollout_is and not bypass(resolved):
        columns.append("rollout_is_weights")
    return ActorLoss(
        loss_mode=loss_mode(resolved),
        loss_agg_mode=actor.loss_agg_mode,
        clip_ratio_low=actor.clip_ratio_low,
        clip_ratio_high=actor.clip_ratio_high,
        clip_ratio_c=actor.clip_ratio_c,
        entropy_coeff=actor.entropy_coeff,
        use_kl_loss=actor.use_kl_loss,
        kl_loss_coef=actor.kl_loss_coef,
        kl_loss_type=actor.kl_loss_type,
        loss_scale_factor=actor.loss_scale_factor,
        options=policy_losses.LossOptions(
            tau_pos=actor.tau_pos,
            tau_neg=actor.tau_neg,
            ppo_kl_coef=actor.policy_loss.ppo_kl_coef,
            dro_beta=actor.policy_loss.dro_beta,
        ),
        columns=tuple(columns),
        bypass=corrected if bypass(resolved) else None,
    )


def bypass(resolved: Resolved) -> bool:
    """Whether the rollout's log-probs stand for the old ones."""
    return resolved.config.algorithm.rollout_correction.bypass_mode


def correction(resolved: Resolved) -> Correction | None:
    """Rollout correction, None where neither weights nor rejection are asked for."""
    keys = resolved.config.algorithm.rollout_correction
    if not keys.rollout_is and not keys.rollout_rs:
        return None
    return Correction(
        keys.rollout_is,
        keys.rollout_is_threshold,
        keys.rollout_is_batch_normalize,
        keys.rollout_rs,
        keys.rollout_rs_threshold,
    )


def old_logprobs(resolved: Resolved) -> Literal["rollout", "pass", "update"]:
    """Where old log-probs come from: the rollout engine (bypass), a forward pass, or, when the one update is exactly
    on-policy and nothing needs them earlier, the update's own forward."""
    if bypass(resolved):
        return "rollout"
    needed = (
        resolved.config.algorithm.use_kl_in_reward
        or correction(resolved)
        or estimators.find(resolved.config.algorithm.adv_estimator).needs & {"old_logprobs", "sum_pi_squared"}
        or policy_losses.find(loss_mode(resolved)).needs
    )
    return "pass" if needed or resolved.batch.actor_optimizer_steps > 1 else "update"


def old_outputs(resolved: Resolved) -> dict[str, str]:
    """Columns of the old-log-prob pass and the head's outputs that fill them."""
    columns = {"old_logprobs": "logprobs"}
    if "sum_pi_squared" in estimators.find(resolved.config.algorithm.adv_estimator).needs:
        columns["sum_pi_squared"] = "sum_pi_squared"
    return columns


def selection(resolved: Resolved) -> dict | None:
    """How clip_cov or kl_cov select tokens; None for other losses."""
    keys, seed = resolved.config.actor_rollout_ref.actor.policy_loss, resolved.config.actor_rollout_ref.rollout.seed
    if "selected" not in policy_losses.find(loss_mode(resolved)).needs:
        return None
    if loss_mode(resolved) == "clip_cov":
        return dict(ratio=keys.clip_cov_ratio, lower=keys.clip_cov_lb, upper=keys.clip_cov_ub, seed=seed)
    return dict(ratio=keys.kl_cov_ratio, seed=seed)


def generation(resolved: Resolved, stop_token_ids: tuple[int, ...]) -> GenerationSettings:
    """How a step's samples are made."""
    config = resolved.config
    groups, overlong = config.algorithm.filter_groups, config.reward.reward_kwargs.overlong_buffer_cfg
    drawn = sampling(resolved, stop_token_ids)
    return GenerationSettings(
        n=config.actor_rollout_ref.rollout.n,
        prompts=config.data.train_batch_size,
        sampling=drawn,
        greedy=replace(drawn, temperature=0.0, top_p=1.0, top_k=-1)
        if "reward_baselines" in estimators.find(config.algorithm.adv_estimator).needs
        else None,
        overlong=Overlong(config.data.max_response_length, overlong.len, overlong.penalty_factor)
        if overlong.enable
        else None,
        group_filter=GroupFilter(groups.metric, groups.max_num_gen_batches)
        if groups.enable
        else None,
    )


def critic_loss(resolved: Resolved) -> CriticLoss:
    critic = resolved.config.critic
    return CriticLoss(
        critic.cliprange_value, critic.loss_agg_mode, resolved.config.actor_rollout_ref.actor.loss_scale_factor
    )


def server(resolved: Resolved) -> ServerSettings:
    """What vLLM is started with."""
    arr = resolved.config.actor_rollout_ref
    rollout = arr.rollout
    return ServerSettings(
        model_path=arr.model.path,
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        dtype=rollout.dtype,
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        cpu_kvcache_gib=rollout.cpu_kvcache_gib,
        enforce_eager=rollout.enforce_eager,
        enable_prefix_caching=rollout.enable_prefix_caching,
        enable_chunked_prefill=rollout.enable_chunked_prefill,
        # without a trainer nobody else brings weights
        load_format="auto" if resolved.config.trainer.debug == "rollout" else rollout.load_format,
        seed=rollout.seed,
        omp_threads=max(1, resolved.machine.cores // resolved.rollout.replicas),
        sleep=sleeps(resolved),
        engine_kwargs={"trust_remote_code": arr.model.trust_remote_code, **rollout.engine_kwargs.vllm},
    )


def sampling(resolved: Resolved, stop_token_ids: tuple[int, ...]) -> SamplingSettings:
    """How training samples are drawn."""
    rollout = resolved.config.actor_rollout_ref.rollout
    return SamplingSettings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=resolved.config.data.max_response_length,
        seed=rollout.seed,
        stop_token_ids=stop_token_ids,
    )


def val_sampling(resolved: Resolved, stop_token_ids: tuple[int, ...]) -> SamplingSettings:
    """How validation samples are drawn: greedy unless val_kwargs.do_sample."""
    rollout = resolved.config.actor_rollout_ref.rollout
    val = rollout.val_kwargs
    return SamplingSettings(
        temperature=val.temperature if val.do_sample else 0.0,
        top_p=val.top_p if val.do_sample else 1.0,
        top_k=val.top_k if val.do_sample else -1,
        max_tokens=resolved.config.data.max_response_length,
        seed=rollout.seed,
        stop_token_ids=stop_token_ids,
    )


def dataset(data: Data, validation: bool) -> dict:
    """Arguments of PromptDataset."""
    return dict(
        files=data.val_files if validation else data.train_files,
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
        filter_overlong_prompts=data.filter_overlong_prompts,
        prompt_key=data.prompt_key,
        reward_fn_key=data.reward_fn_key,
        max_samples=data.val_max_samples if validation else data.train_max_samples,
        apply_chat_template_kwargs=data.apply_chat_template_kwargs,
        key_prefix="data.val_files" if validation else "data.train_files",
    )


def loader(data: Data) -> dict:
    """Arguments of PromptLoader."""
    return dict(batch_size=data.train_batch_size, shuffle=data.shuffle, seed=data.seed)


def advantages(resolved: Resolved) -> dict:
    """Arguments of algorithms.advantages.compute beside the tensors."""
    algorithm = resolved.config.algorithm
    keys = algorithm.gdpo_reward_keys if algorithm.adv_estimator == "gdpo" else []
    return dict(
        name=algorithm.adv_estimator,
        options=dict(
            gamma=algorithm.gamma, lam=algorithm.lam, norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo
        ),
        reward_keys=keys,
        reward_weights=algorithm.gdpo_reward_weights or [1.0] * len(keys),
    )


def kl_in_reward(resolved: Resolved) -> dict | None:
    """The estimator's kind and the arguments of its controller; None when rewards carry no KL."""
    algorithm = resolved.config.algorithm
    if not algorithm.use_kl_in_reward:
        return None
    ctrl = algorithm.kl_ctrl
    return dict(
        kind=algorithm.kl_penalty,
        controller=dict(type=ctrl.type, kl_coef=ctrl.kl_coef, horizon=ctrl.horizon, target_kl=ctrl.target_kl),
    )


def reward(resolved: Resolved) -> dict:
    """Arguments of RewardManager."""
    config = resolved.config
    return dict(
        num_workers=max(1, min(config.reward.num_workers, resolved.machine.cores)),
        timeout_s=config.reward.timeout,
        custom_path=config.custom_reward_function.path,
        custom_name=config.custom_reward_function.name,
    )


def sft_pool(config: SFTConfig, role: Role, device: str, total_steps: int, threads: int) -> PoolSettings:
    """The one pool of a supervised run."""
    engine = EngineSettings(
        role="policy",
        model_path=config.model.path,
        megatron=config.megatron,
        optim=config.optim,
        total_steps=total_steps,
        trust_remote_code=config.model.trust_remote_code,
    )
    return PoolSettings(device, role.ranks, role.tp, role.pp, config.megatron.seed, {"actor": engine}, threads)
