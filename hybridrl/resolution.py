"""What a run will be on this machine: every derived key filled in, the ranks of each role, the batch plan.

`resolve` is pure: the same configuration and machine give the same answer, and nothing downstream
derives a second time.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

from hybridrl.config import Actor, ConfigError, Critic, Model, Parallel, PPOConfig, Ref, Rollout, SFTConfig


@dataclass(frozen=True)
class Machine:
    """What this host has. device: "cpu" or "cuda"; gpus, cores: counts; memory_gib: of host memory."""

    device: str
    gpus: int
    cores: int
    memory_gib: float


@dataclass(frozen=True)
class Role:
    """The ranks of a model: its pool and how Megatron splits it. colocated: in the actor's processes."""

    ranks: int
    tp: int
    pp: int
    dp: int
    sequence_parallel: bool
    dtype: str
    colocated: bool
    vpp: int = 1


@dataclass(frozen=True)
class RolloutPlan:
    """vLLM's engines. gpus: of the pool they live on (0 on CPU)."""

    replicas: int
    tp: int
    gpus: int
    colocated: bool


@dataclass(frozen=True)
class BatchPlan:
    """The sizes of a step, in prompts, samples and optimizer steps. steps_per_epoch and total_steps need the data."""

    prompts: int
    samples: int
    mini_batch_prompts: int
    mini_batch_samples: int
    mini_batches: int
    actor_optimizer_steps: int
    critic_mini_batches: int
    critic_optimizer_steps: int
    total_epochs: int
    total_training_steps: int | None
    steps_per_epoch: int | None = None
    total_steps: int | None = None

    def with_data(self, num_prompts: int) -> "BatchPlan":
        """The plan once the number of training prompts (after filtering) is known. The last, smaller batch of an epoch
        is dropped. ConfigError when the data do not fill one batch."""
        per_epoch = num_prompts // self.prompts
        if per_epoch == 0:
            raise ConfigError(
                f"data.train_batch_size={self.prompts}: data.train_files have {num_prompts} usable prompts, fewer than"
                " one batch; lower it (and ppo_mini_batch_size), or add data"
            )
        total = self.total_epochs * per_epoch if self.total_training_steps is None else self.total_training_steps
        return replace(self, steps_per_epoch=per_epoch, total_steps=total)


@dataclass(frozen=True)
class Resolved:
    """A PPO run. config has no None where a value is needed; critic and ref are None when the run has none."""

    config: PPOConfig
    machine: Machine
    actor: Role
    critic: Role | None
    ref: Role | None
    rollout: RolloutPlan
    batch: BatchPlan

    @property
    def use_critic(self) -> bool:
        return self.critic is not None

    @property
    def use_ref(self) -> bool:
        return self.ref is not None


@dataclass(frozen=True)
class ResolvedSFT:
    """A supervised run under torchrun."""

    config: SFTConfig
    machine: Machine
    actor: Role


def detect_machine(device: str) -> Machine:
    """This host. device: "auto" (CUDA if a GPU is there), "cuda" or "cpu". Makes no CUDA context."""
    import psutil
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(kind, gpus, cores, psutil.virtual_memory().total / 2**30)


def resolve(config: Any, machine: Machine, world: int | None = None) -> Any:
    """Resolved for a PPOConfig, ResolvedSFT for an SFTConfig; config is one that `check` has passed.

    world: ranks of a supervised run (None: torchrun's WORLD_SIZE, else 1). Raises ConfigError where the machine cannot
    hold what the configuration asks for, naming the key and the mend.
    """
    if isinstance(config, SFTConfig):
        return _resolve_sft(config, machine, int(os.environ.get("WORLD_SIZE", 1)) if world is None else world)
    filled = _filled(config, machine)
    actor = _role(filled.actor_rollout_ref.actor.megatron, ranks_of_actor(config), colocated=True)
    pools = config.trainer.placement
    critic = _role(filled.critic.megatron, pools.critic or actor.ranks, pools.critic is None)
    ref = _role(filled.actor_rollout_ref.ref.megatron, pools.ref or actor.ranks, pools.ref is None)
    resolved = Resolved(
        config=filled,
        machine=machine,
        actor=actor,
        critic=critic if filled.critic.enable else None,
        ref=ref if needs_reference(config) else None,
        rollout=_rollout_plan(filled, machine, actor),
        batch=_batch_plan(filled),
    )
    _fits(resolved)
    filled_rollout = replace(filled.actor_rollout_ref.rollout, num_replicas=resolved.rollout.replicas)
    arr = replace(filled.actor_rollout_ref, rollout=filled_rollout)
    return replace(resolved, config=replace(filled, actor_rollout_ref=arr))


def ranks_of_actor(config: PPOConfig) -> int:
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def needs_reference(config: PPOConfig) -> bool:
    return config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward


def needs_critic(config: PPOConfig) -> bool:
    from hybridrl.algorithms import advantages

    return advantages.needs_critic(config.algorithm.adv_estimator)


def own(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def home(path: Any) -> Any:
    """A path, a list of paths or None with a leading ~ expanded: no shell does that behind `key=`."""
    if isinstance(path, list):
        return [home(part) for part in path]
    return path and os.path.expanduser(path)


def fill_megatron(megatron: Any, base: Parallel | None = None) -> Any:
    """A role's Megatron group with what it inherits from base (the actor's, filled), or the actor's own."""
    base = base or Parallel(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        dtype="bfloat16",
    )
    pp = own(megatron.pipeline_model_parallel_size, base.pipeline_model_parallel_size)
    chunks = base.virtual_pipeline_model_parallel_size if pp > 1 else 1
    tp = own(megatron.tensor_model_parallel_size, base.tensor_model_parallel_size)
    inherited = None if base.tensor_model_parallel_size == 1 else base.sequence_parallel
    return replace(
        megatron,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=own(megatron.virtual_pipeline_model_parallel_size, chunks),
        # Without tensor parallelism there is nothing to split: off, as in verl, whose default is on.
        sequence_parallel=tp > 1 and own(megatron.sequence_parallel, own(inherited, True)),
        dtype=own(megatron.dtype, base.dtype),
    )


def mini_batch_prompts(config: PPOConfig) -> int:
    """The actor's mini-batch: as set, or the default but no more than the whole batch."""
    wanted = config.actor_rollout_ref.actor.ppo_mini_batch_size
    if "actor_rollout_ref.actor.ppo_mini_batch_size" in config.explicit:
        return wanted
    return min(wanted, config.data.train_batch_size)


def _filled(config: PPOConfig, machine: Machine) -> PPOConfig:
    arr, trainer = config.actor_rollout_ref, config.trainer
    run = _run_folder(trainer)
    actor, custom = _filled_actor(config), config.custom_reward_function
    return replace(
        config,
        data=_filled_data(config.data, seed=own(config.data.seed, 1)),
        actor_rollout_ref=replace(
            arr,
            model=_filled_model(arr.model),
            actor=actor,
            ref=_filled_ref(arr.ref, actor),
            rollout=_filled_rollout(config, actor, machine),
        ),
        critic=_filled_critic(config, actor),
        custom_reward_function=replace(custom, path=home(custom.path)),
        trainer=replace(
            trainer,
            device=machine.device,
            default_local_dir=run,
            resume_from_path=home(trainer.resume_from_path),
            rollout_data_dir=own(home(trainer.rollout_data_dir), os.path.join(run, "rollouts")),
        ),
    )


def _run_folder(trainer: Any) -> str:
    return own(
        home(trainer.default_local_dir), os.path.join("checkpoints", trainer.project_name, trainer.experiment_name)
    )


def _filled_data(data: Any, **further: Any) -> Any:
    return replace(data, train_files=home(data.train_files), val_files=home(data.val_files), **further)


def _filled_model(model: Model) -> Model:
    return replace(model, path=home(model.path), tokenizer_path=home(own(model.tokenizer_path, model.path)))


def _filled_actor(config: PPOConfig) -> Actor:
    actor = config.actor_rollout_ref.actor
    return replace(
        actor,
        ppo_mini_batch_size=mini_batch_prompts(config),
        use_dynamic_bsz=own(actor.use_dynamic_bsz, actor.ppo_micro_batch_size_per_gpu is None),
        clip_ratio_low=own(actor.clip_ratio_low, actor.clip_ratio),
        clip_ratio_high=own(actor.clip_ratio_high, actor.clip_ratio),
        loss_scale_factor=own(actor.loss_scale_factor, float(config.data.max_response_length)),
        megatron=fill_megatron(actor.megatron),
    )


def _filled_ref(ref: Ref, actor: Actor) -> Ref:
    return replace(
        ref,
        log_prob_max_token_len_per_gpu=own(ref.log_prob_max_token_len_per_gpu, actor.ppo_max_token_len_per_gpu),
        megatron=fill_megatron(ref.megatron, actor.megatron),
    )


def _filled_rollout(config: PPOConfig, actor: Actor, machine: Machine) -> Rollout:
    rollout = config.actor_rollout_ref.rollout
    return replace(
        rollout,
        tensor_model_parallel_size=own(rollout.tensor_model_parallel_size, 1),
        dtype=own(rollout.dtype, actor.megatron.dtype),
        max_model_len=own(rollout.max_model_len, config.data.max_prompt_length + config.data.max_response_length),
        enforce_eager=own(rollout.enforce_eager, machine.device == "cpu"),
        log_prob_max_token_len_per_gpu=own(rollout.log_prob_max_token_len_per_gpu, actor.ppo_max_token_len_per_gpu),
    )


def _filled_critic(config: PPOConfig, actor: Actor) -> Critic:
    critic = config.critic
    return replace(
        critic,
        enable=own(critic.enable, needs_critic(config)),
        ppo_mini_batch_size=own(critic.ppo_mini_batch_size, actor.ppo_mini_batch_size),
        ppo_epochs=own(critic.ppo_epochs, actor.ppo_epochs),
        ppo_max_token_len_per_gpu=own(critic.ppo_max_token_len_per_gpu, actor.ppo_max_token_len_per_gpu),
        loss_agg_mode=own(critic.loss_agg_mode, actor.loss_agg_mode),
        model=replace(critic.model, path=home(own(critic.model.path, config.actor_rollout_ref.model.path))),
        megatron=fill_megatron(critic.megatron, actor.megatron),
    )


def _role(megatron: Parallel, ranks: int, colocated: bool) -> Role:
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    vpp = megatron.virtual_pipeline_model_parallel_size
    return Role(ranks, tp, pp, ranks // (tp * pp), megatron.sequence_parallel, megatron.dtype, colocated, vpp)


def _rollout_plan(config: PPOConfig, machine: Machine, actor: Role) -> RolloutPlan:
    rollout, pool = config.actor_rollout_ref.rollout, config.trainer.placement.rollout
    tp = rollout.tensor_model_parallel_size
    if machine.device == "cpu":
        if tp > 1:
            raise ConfigError(f"actor_rollout_ref.rollout.tensor_model_parallel_size={tp}: must be 1 on CPU")
        if pool and rollout.num_replicas and pool != rollout.num_replicas:
            raise ConfigError(
                f"trainer.placement.rollout={pool} and actor_rollout_ref.rollout.num_replicas={rollout.num_replicas}"
                " differ: on CPU both count vLLM's engines; keep one"
            )
        return RolloutPlan(own(rollout.num_replicas, own(pool, 1)), 1, 0, pool is None)
    gpus = own(pool, actor.ranks)
    replicas = own(rollout.num_replicas, gpus // tp if config.trainer.executor == "ray" else 1)
    if gpus % tp or not 1 <= replicas <= gpus // tp:
        raise ConfigError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={tp} x num_replicas={replicas}: the pool has {gpus}"
            f" GPUs; the product must be at most that, and tensor_model_parallel_size must divide {gpus}"
        )
    per_node = config.trainer.n_gpus_per_node
    if pool is None and per_node % tp:
        raise ConfigError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={tp}: an engine lives on one node and "
            f"trainer.n_gpus_per_node={per_node} is no multiple of it"
        )
    return RolloutPlan(replicas, tp, gpus, pool is None)


def _batch_plan(config: PPOConfig) -> BatchPlan:
    actor, critic, n = config.actor_rollout_ref.actor, config.critic, config.actor_rollout_ref.rollout.n
    prompts = config.data.train_batch_size
    mini, critic_mini = prompts // actor.ppo_mini_batch_size, prompts // critic.ppo_mini_batch_size
    return BatchPlan(
        prompts=prompts,
        samples=prompts * n,
        mini_batch_prompts=actor.ppo_mini_batch_size,
        mini_batch_samples=actor.ppo_mini_batch_size * n,
        mini_batches=mini,
        actor_optimizer_steps=mini * actor.ppo_epochs,
        critic_mini_batches=critic_mini if critic.enable else 0,
        critic_optimizer_steps=critic_mini * critic.ppo_epochs if critic.enable else 0,
        total_epochs=config.trainer.total_epochs,
        total_training_steps=config.trainer.total_training_steps,
    )


def _fits(resolved: Resolved) -> None:
    """More ranks than the machine has is an error here. A cluster's nodes are Ray's to count."""
    trainer, machine = resolved.config.trainer, resolved.machine
    _fits_torchrun(trainer)
    if machine.device == "cpu" and trainer.n_gpus_per_node > trainer.cpu_ranks_max:
        raise ConfigError(
            f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}: on CPU it counts ranks, and trainer.cpu_ranks_max="
            f"{trainer.cpu_ranks_max} is the most; lower the first or raise the second"
        )
    rollout = resolved.config.actor_rollout_ref.rollout
    if machine.device == "cpu" and rollout.max_num_batched_tokens < rollout.max_model_len:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens} is less than a sequence"
            f" of {rollout.max_model_len} tokens, and vLLM on CPU takes a prompt in one step; raise it"
        )
    cluster = trainer.nnodes > 1 or resolved.config.ray_kwargs.ray_init.address or os.environ.get("RAY_ADDRESS")
    if machine.device == "cuda" and not cluster:
        pools = [own(pool, 0) for pool in (trainer.placement.critic, trainer.placement.ref, trainer.placement.rollout)]
        wanted = resolved.actor.ranks + sum(pools)
        if wanted > machine.gpus:
            extra = " plus the pools of trainer.placement" if any(pools) else ""
            raise ConfigError(
                f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}{extra} asks for {wanted} GPUs and this machine has "
                f"{machine.gpus}; lower it, join a cluster (ray_kwargs.ray_init.address), or set trainer.device=cpu"
            )


def _fits_torchrun(trainer: Any) -> None:
    started = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun sets it
    if trainer.executor != "torchrun":
        if started:
            raise ConfigError(f"trainer.executor={trainer.executor} under torchrun: set trainer.executor=torchrun")
        return
    if not started:
        raise ConfigError(
            "trainer.executor=torchrun: start it as `torchrun --nproc_per_node N -m hybridrl.trainer.main_ppo ...`"
            " (launch/torchrun.sh with MODULE=hybridrl.trainer.main_ppo)"
        )
    world, ranks = int(os.environ["WORLD_SIZE"]), trainer.nnodes * trainer.n_gpus_per_node
    if world != ranks:
        raise ConfigError(
            f"trainer.nnodes={trainer.nnodes} x trainer.n_gpus_per_node={trainer.n_gpus_per_node} = {ranks} and"
            f" torchrun started {world} ranks: make them equal"
        )


def _resolve_sft(config: SFTConfig, machine: Machine, world: int) -> ResolvedSFT:
    trainer = config.trainer
    run = _run_folder(trainer)
    megatron = fill_megatron(config.megatron)
    shards = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
    if world % shards:
        raise ConfigError(
            f"megatron.tensor_model_parallel_size x pipeline_model_parallel_size = {shards} does not divide the {world}"
            " ranks; start a multiple of it with torchrun --nproc_per_node"
        )
    role = _role(megatron, world, colocated=True)
    if config.data.train_batch_size < role.dp:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size}: fewer samples than the {role.dp} data-parallel"
            " ranks"
        )
    if machine.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > machine.gpus:
        raise ConfigError(
            f"torchrun --nproc_per_node: more ranks than the {machine.gpus} GPUs here; or set trainer.device=cpu"
        )
    filled = replace(
        config,
        data=_filled_data(config.data),
        model=_filled_model(config.model),
        megatron=megatron,
        trainer=replace(trainer, device=machine.device, default_local_dir=run),
    )
    return ResolvedSFT(filled, machine, role)
