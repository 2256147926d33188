"""verl's keys that hybridrl does not have: honoured, translated or refused with the mend.

Honoured: hybridrl always works that way, so the key changes nothing as long as its value agrees. Translated: the same
meaning under a key of hybridrl's. Refused: no such thing here (yet), and the sentence says what to do instead. A key
that none of the tables knows stays unknown, and `configuration.build` reports it with near matches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hybridrl.config import PPOConfig

# Names of verl's own main configuration files; each means hybridrl's defaults.
CONFIG_NAMES = ("ppo_megatron_trainer", "ppo_trainer", "sft_trainer", "sft_trainer_engine")

ANY = object()


@dataclass(frozen=True)
class Honoured:
    values: tuple  # those that agree with how hybridrl works; (ANY,) for a key without influence on the result
    mend: str = ""


@dataclass(frozen=True)
class Moved:
    to: str  # KEY, or KEY:NAME for an entry of a dict-valued key


@dataclass(frozen=True)
class Derived:
    make: Callable[[str, Any, "Context"], dict[str, Any]]


@dataclass(frozen=True)
class Refused:
    mend: str


@dataclass(frozen=True)
class Context:
    """The known keys of the same configuration, and which of them the user has set."""

    values: dict[str, Any]
    explicit: frozenset[str]
    ppo: bool


class Refusal(ValueError):
    """A value that a derivation cannot carry over; the text is the mend."""


def _token_budget(target: str) -> Derived:
    """verl's samples of a micro-batch as a token budget: so many samples of the greatest length fit in it."""

    def make(name: str, value: Any, context: Context) -> dict[str, Any]:
        if value is None:
            return {}
        if target in context.explicit:
            raise Refusal(f"{target} says the same in tokens; keep one of the two")
        if type(value) is not int or value < 1:
            raise Refusal("must be a positive number of samples")
        parts = ("data.max_prompt_length", "data.max_response_length") if context.ppo else ("data.max_length",)
        lengths = [context.values[part] for part in parts]
        if not all(type(length) is int for length in lengths):
            return {}  # the lengths' own message says it
        return {target: value * sum(lengths)}

    return Derived(make)


def _recompute(target: str) -> Derived:
    """Gradient checkpointing as Megatron's full recomputation, unless recompute_* fields are set by hand."""

    def make(name: str, value: Any, context: Context) -> dict[str, Any]:
        if value not in (True, False):
            raise Refusal("must be true or false")
        given = context.values[target]
        if not value or not isinstance(given, dict) or any(field.startswith("recompute_") for field in given):
            return {}
        return {target: given | dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)}

    return Derived(make)


def _same_as(other: str) -> Derived:
    """A second name for a key: fine when it says the same (or nothing)."""

    def make(name: str, value: Any, context: Context) -> dict[str, Any]:
        if value is not None and value != context.values[other]:
            raise Refusal(f"set {other} (now {context.values[other]!r}), which it follows")
        return {}

    return Derived(make)


def _rollout_pool(name: str, value: Any, context: Context) -> dict[str, Any]:
    if value in (None, 0) or (name.endswith("n_gpus_per_node") and value == context.values["trainer.n_gpus_per_node"]):
        return {}
    raise Refusal("trainer.placement.rollout=GPUS gives the rollout a pool of its own")


def _tis_cap(name: str, value: Any, context: Context) -> dict[str, Any]:
    """verl's older key of truncated importance sampling, a token at a time."""
    if value in (None, -1):
        return {}
    keys = "algorithm.rollout_correction"
    return {f"{keys}.rollout_is": "token", f"{keys}.rollout_is_threshold": str(value)}


def _overlong(group: str, buffer: str = "overlong_buffer_cfg") -> dict[str, Any]:
    """DAPO's over-long penalty as verl's versions spell it."""
    ours = "reward.reward_kwargs.overlong_buffer_cfg"
    moved = {f"{group}.{buffer}.{key}": Moved(f"{ours}.{key}") for key in ("enable", "len", "penalty_factor")}
    if f"{group}.{buffer}" == ours:
        moved = {}
    further = {f"{group}.{buffer}.log": Honoured((ANY,)), f"{group}.max_resp_len": _same_as("data.max_response_length")}
    return moved | further


OFF = (False, None)
MANAGERS = ("naive", "dapo", "gdpo")
NEXT = "is not in hybridrl yet; leave it out"
ARM = "actor_rollout_ref.model"
ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
FSDP = Refused("training is Megatron-core's: use the megatron.* keys of the same role instead")
PARAMS = Honoured(
    OFF, "parameters stay on the device; free memory with optimizer_offload, grad_offload or trainer.placement"
)

# Patterns as in fnmatch; the first that fits is taken, so exact keys stand before wider ones.
PPO: dict[str, Any] = {
    "model_engine": Honoured(
        ("megatron",), "Megatron-core is the only training engine: model_engine=megatron, or leave it out"
    ),
    # data
    "data.val_batch_size": Honoured((ANY,)),  # validation is always one batch for the engine
    "data.gen_batch_size": _same_as("data.train_batch_size"),
    "data.return_raw_chat": Honoured((ANY,)),  # prompts are tokenised once, tokens travel
    "data.return_raw_input_ids": Honoured((ANY,)),
    "data.return_full_prompt": Honoured((ANY,)),
    "data.return_multi_modal_inputs": Honoured((ANY,)),
    "data.filter_overlong_prompts_workers": Honoured((ANY,)),
    "data.dataloader_num_workers": Honoured((ANY,)),
    "data.use_shm": Honoured(OFF, "copy the files to /dev/shm and name them in data.train_files"),
    "data.tokenizer": Moved(f"{ARM}.tokenizer_path"),
    "data.trust_remote_code": Moved(f"{ARM}.trust_remote_code"),
    "data.validation_shuffle": Honoured(OFF, "validation takes the rows in their order"),
    "data.image_key": Honoured((ANY,)),
    "data.video_key": Honoured((ANY,)),
    "data.custom_cls.path": Honoured(
        (None,), "write the data as Parquet in verl's schema (hybridrl.data.preprocess shows how)"
    ),
    "data.custom_cls.name": Honoured(
        (None,), "write the data as Parquet in verl's schema (hybridrl.data.preprocess shows how)"
    ),
    "data.sampler.*": Honoured((None,), "hybridrl draws prompts in the order of data.shuffle and data.seed"),
    # model
    f"{ARM}.use_remove_padding": Honoured(
        (True,), "sequences are always packed without padding: True, or leave it out"
    ),
    f"{ARM}.enable_gradient_checkpointing": _recompute(f"{ACTOR}.megatron.override_transformer_config"),
    f"{ARM}.use_fused_kernels": Honoured((ANY,)),  # the log-prob never holds [tokens, vocabulary] in either case
    f"{ARM}.fused_kernel_options.*": Honoured((ANY,)),
    f"{ARM}.use_shm": Honoured(OFF, f"copy the model to /dev/shm and name it in {ARM}.path"),
    f"{ARM}.external_lib": Honoured((None,), "import the library in the file of custom_reward_function.path"),
    f"{ARM}.override_config": Honoured(({}, None), "change config.json in the model's folder"),
    f"{ARM}.override_config.*": Refused("change config.json in the model's folder"),
    f"{ARM}.lora*": Honoured((0, None, False), f"LoRA {NEXT}"),
    f"{ARM}.target_modules": Honoured((ANY,)),
    f"{ARM}.mtp.*": Honoured(OFF, f"multi-token prediction {NEXT}"),
    f"{ARM}.enable_activation_offload": Honoured(
        OFF, f"{ACTOR}.megatron.override_transformer_config.cpu_offloading is Megatron's"
    ),
    # actor
    f"{ACTOR}.strategy": Honoured(("megatron",), "Megatron-core is the only training engine"),
    f"{ACTOR}.ppo_micro_batch_size": Honoured(
        (None,), f"set {ACTOR}.ppo_micro_batch_size_per_gpu with use_dynamic_bsz=false"
    ),
    f"{ACTOR}.grad_clip": Moved(f"{ACTOR}.optim.clip_grad"),
    f"{ACTOR}.calculate_entropy": Honoured((ANY,)),  # the entropy comes out of the log-prob pass for nothing
    f"{ACTOR}.use_torch_compile": Honoured((ANY,)),
    f"{ACTOR}.load_weight": Honoured((True,), f"start from {ARM}.path; a folder with random weights will do"),
    f"{ACTOR}.ulysses_sequence_parallel_size": Honoured(
        (1, None), f"{ACTOR}.megatron.sequence_parallel splits sequences"
    ),
    f"{ACTOR}.entropy_checkpointing": Honoured((ANY,)),
    f"{ACTOR}.entropy_from_logits_with_chunking": Honoured((ANY,)),  # always in chunks
    f"{ACTOR}.checkpoint.contents": Moved(f"{ACTOR}.checkpoint.save_contents"),
    f"{ACTOR}.checkpoint.load_contents": _same_as(f"{ACTOR}.checkpoint.save_contents"),
    f"{ACTOR}.checkpoint.async_save": Honoured(OFF, "checkpoints are written before the next step starts"),
    f"{ACTOR}.router_replay.*": Honoured((None, "disabled", False), f"router replay {NEXT}"),
    f"{ACTOR}.tis_imp_ratio_cap": Derived(_tis_cap),
    f"{ACTOR}.policy_loss.tau_pos": Moved(f"{ACTOR}.tau_pos"),
    f"{ACTOR}.policy_loss.tau_neg": Moved(f"{ACTOR}.tau_neg"),
    f"{ACTOR}.policy_loss.rollout_correction.*": Refused("set algorithm.rollout_correction.*"),
    f"{ACTOR}.policy_loss.*": Refused(f"belongs to a policy loss that {NEXT}"),
    # reference and rollout
    f"{REF}.megatron.seed": Honoured((ANY,)),  # forward only: nothing to initialise, shard or offload
    f"{REF}.megatron.use_distributed_optimizer": Honoured((ANY,)),
    f"{REF}.megatron.grad_offload": Honoured((ANY,)),
    f"{REF}.megatron.optimizer_offload": Honoured((ANY,)),
    f"{REF}.strategy": Honoured(("megatron",), "Megatron-core is the only training engine"),
    f"{REF}.log_prob_use_dynamic_bsz": Honoured((ANY,)),  # forward passes are always packed to a token budget
    f"{REF}.log_prob_micro_batch_size_per_gpu": _token_budget(f"{REF}.log_prob_max_token_len_per_gpu"),
    f"{REF}.log_prob_micro_batch_size": Honoured((None,), f"set {REF}.log_prob_micro_batch_size_per_gpu"),
    f"{REF}.load_weight": Honoured((True,), "the reference is the starting model"),
    f"{REF}.use_torch_compile": Honoured((ANY,)),
    f"{ROLLOUT}.mode": Honoured(("async", "sync"), "async"),  # a server either way; what it generates is the same
    f"{ROLLOUT}.log_prob_use_dynamic_bsz": Honoured((ANY,)),
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": _token_budget(f"{ROLLOUT}.log_prob_max_token_len_per_gpu"),
    f"{ROLLOUT}.log_prob_micro_batch_size": Honoured((None,), f"set {ROLLOUT}.log_prob_micro_batch_size_per_gpu"),
    f"{ROLLOUT}.prompt_length": _same_as("data.max_prompt_length"),
    f"{ROLLOUT}.response_length": _same_as("data.max_response_length"),
    f"{ROLLOUT}.do_sample": Honoured(
        (True,), f"greedy rollouts have no group to compare: {ROLLOUT}.temperature sets the spread"
    ),
    f"{ROLLOUT}.ignore_eos": Honoured(OFF, "a response ends at its end-of-sequence token"),
    f"{ROLLOUT}.calculate_log_probs": Honoured((ANY,)),  # always kept: vLLM returns them with the tokens
    f"{ROLLOUT}.disable_log_stats": Honoured((ANY,)),
    f"{ROLLOUT}.skip_tokenizer_init": Honoured((ANY,)),
    f"{ROLLOUT}.multi_stage_wake_up": Honoured((ANY,)),  # weights first, KV cache last, always
    f"{ROLLOUT}.layered_summon": Honoured((ANY,)),
    f"{ROLLOUT}.use_fire_sampling": Honoured(OFF, "is not in vLLM"),
    f"{ROLLOUT}.over_sample_rate": Honoured((0, 0.0, None), f"over-sampling {NEXT}"),
    f"{ROLLOUT}.data_parallel_size": Honoured((1, None), f"{ROLLOUT}.num_replicas is the number of engines"),
    f"{ROLLOUT}.expert_parallel_size": Honoured((1, None), f"expert parallelism {NEXT}"),
    f"{ROLLOUT}.pipeline_model_parallel_size": Honoured((1, None), f"use {ROLLOUT}.tensor_model_parallel_size"),
    f"{ROLLOUT}.nnodes": Derived(_rollout_pool),
    f"{ROLLOUT}.n_gpus_per_node": Derived(_rollout_pool),
    f"{ROLLOUT}.quantization": Honoured((None,), f"quantised rollouts {NEXT}"),
    f"{ROLLOUT}.cudagraph_capture_sizes": Moved(f"{ROLLOUT}.engine_kwargs.vllm:cudagraph_capture_sizes"),
    f"{ROLLOUT}.engine_kwargs.sglang*": Refused("rollouts are vLLM's: engine_kwargs.vllm"),
    f"{ROLLOUT}.multi_turn.enable": Honoured(OFF, f"multi-turn rollouts {NEXT}"),
    f"{ROLLOUT}.multi_turn.*": Honoured((ANY,)),  # without effect in verl as well while enable is false
    f"{ROLLOUT}.agent.default_agent_loop": Honoured(("single_turn_agent", None), f"multi-turn rollouts {NEXT}"),
    f"{ROLLOUT}.agent.num_workers": Honoured((ANY,)),
    f"{ROLLOUT}.agent.*": Honoured((None,), f"multi-turn rollouts {NEXT}"),
    f"{ROLLOUT}.checkpoint_engine.backend": Honoured(
        ("naive", None), "weights move by hybridrl's own plan; leave it out"
    ),
    f"{ROLLOUT}.*update_weights_bucket_megabytes": Honoured((ANY,)),  # there is no bucket
    f"{ROLLOUT}.enable_sleep_mode": Moved(f"{ROLLOUT}.free_cache_engine"),
    f"{ROLLOUT}.limit_images": Honoured((None,), f"images {NEXT}"),
    # critic
    "critic.strategy": Honoured(("megatron",), "Megatron-core is the only training engine"),
    "critic.ppo_micro_batch_size": Honoured((None,), "set critic.ppo_micro_batch_size_per_gpu"),
    "critic.ppo_micro_batch_size_per_gpu": _token_budget("critic.ppo_max_token_len_per_gpu"),
    "critic.forward_micro_batch_size_per_gpu": Honoured((ANY,)),  # values are packed to the critic's token budget
    "critic.forward_max_token_len_per_gpu": Honoured((ANY,)),
    "critic.use_dynamic_bsz": Honoured((ANY,)),
    "critic.shuffle": _same_as(f"{ACTOR}.shuffle"),
    "critic.data_loader_seed": _same_as(f"{ACTOR}.data_loader_seed"),
    "critic.rollout_n": _same_as(f"{ROLLOUT}.n"),
    "critic.load_weight": Honoured((True,), "the critic starts from critic.model.path"),
    "critic.grad_clip": Moved("critic.optim.clip_grad"),
    "critic.model.use_remove_padding": Honoured(
        (True,), "sequences are always packed without padding: True, or leave it out"
    ),
    "critic.model.enable_gradient_checkpointing": _recompute("critic.megatron.override_transformer_config"),
    "critic.model.tokenizer_path": Honoured((ANY,)),  # the critic reads token ids
    "critic.model.external_lib": Honoured((None,), "import the library in the file of custom_reward_function.path"),
    "critic.model.override_config": Honoured(({}, None), "change config.json in the model's folder"),
    "critic.model.lora*": Honoured((0, None, False), f"LoRA {NEXT}"),
    "critic.checkpoint.*": Refused(f"the critic is saved as {ACTOR}.checkpoint.save_contents says"),
    "critic.ulysses_sequence_parallel_size": Honoured((1, None), "critic.megatron.sequence_parallel splits sequences"),
    # algorithm and reward
    "algorithm.rollout_correction.debug_rollout_actor_probs": Honoured(
        OFF, f"one optimizer step a batch compares the two for nothing ({ROLLOUT}.log_ppl_check)"
    ),
    "algorithm.filter_groups.max_inflight_gen_batches": Honoured(
        (1, None), "batches are generated one after the other: 1, or leave it out"
    ),
    "algorithm.use_pf_ppo": Honoured(OFF, f"PF-PPO {NEXT}"),
    "algorithm.pf_ppo.*": Honoured((ANY,)),
    "reward.custom_reward_function.path": Moved("custom_reward_function.path"),
    "reward.custom_reward_function.name": Moved("custom_reward_function.name"),
    **_overlong("reward.reward_kwargs"),
    **_overlong("reward_model.reward_kwargs"),
    **_overlong("reward_model", "overlong_buffer"),
    # dapo's over-long penalty has a switch of its own; gdpo's parts are read in any case
    "reward.reward_manager.name": Honoured(MANAGERS, "write a function for custom_reward_function.path"),
    "reward.reward_manager.source": Honoured(("register", None), "write a function for custom_reward_function.path"),
    "reward.reward_model.enable": Honoured(
        OFF, f"a reward model {NEXT}; custom_reward_function.path scores by a function"
    ),
    "reward.reward_model.*": Honoured((ANY,)),
    "reward.sandbox_fusion.url": Honoured((None,), f"a code sandbox {NEXT}"),
    "reward.sandbox_fusion.*": Honoured((ANY,)),
    "reward_model.enable": Honoured(OFF, f"a reward model {NEXT}; custom_reward_function.path scores by a function"),
    "reward_model.reward_manager": Honoured(MANAGERS, "write a function for custom_reward_function.path"),
    "reward_model.launch_reward_fn_async": Honoured((ANY,)),
    "reward_model.num_workers": Moved("reward.num_workers"),
    "reward_model.sandbox_fusion.url": Honoured((None,), f"a code sandbox {NEXT}"),
    "reward_model.*": Honoured((ANY,)),  # about the model that reward_model.enable would start
    "sandbox_fusion.url": Honoured((None,), f"a code sandbox {NEXT}"),
    "sandbox_fusion.*": Honoured((ANY,)),
    # trainer
    "trainer.default_hdfs_dir": Honoured((None,), "mount it and set trainer.default_local_dir"),
    "trainer.del_local_ckpt_after_load": Honoured(OFF, "trainer.max_actor_ckpt_to_keep removes old checkpoints"),
    "trainer.max_critic_ckpt_to_keep": _same_as("trainer.max_actor_ckpt_to_keep"),
    "trainer.remove_previous_ckpt_in_save": Honoured(OFF, "trainer.max_actor_ckpt_to_keep=1 keeps the newest only"),
    "trainer.validation_data_dir": Honoured((None,), "validation samples are always in the run folder, validation/"),
    "trainer.ray_wait_register_center_timeout": Honoured((ANY,)),
    "trainer.log_train_freq": Honoured((1,), "every step is logged"),
    "trainer.use_v1": Honoured((ANY,)),  # there is one trainer
    "trainer.use_legacy_worker_impl": Honoured((ANY,)),
    "trainer.v1.trainer_mode": Honoured(("sync", None), f"asynchronous training {NEXT}"),
    "trainer.esi_redundant_time": Honoured((0, None), "set trainer.save_freq"),
    "trainer.npu_profile.*": Refused("there is no NPU support"),
    "trainer.profile_*": Honoured((None, [], False), f"profiling {NEXT}"),
    "trainer.rollout_data_dir_freq": Honoured((ANY,)),
    "global_profiler.tool": Honoured((None,), f"profiling {NEXT}"),
    "global_profiler.steps": Honoured((None, []), f"profiling {NEXT}"),
    "global_profiler.*": Honoured((ANY,)),
    "*.profiler.enable": Honoured(OFF, f"profiling {NEXT}"),
    "*.profiler.*": Honoured((ANY,)),
    "ray_init.num_cpus": Moved("ray_kwargs.ray_init.num_cpus"),
    "ray_kwargs.timeline_json_file": Honoured((None,), f"a timeline {NEXT}"),
    "transfer_queue.enable": Honoured(OFF, "trajectories travel through Ray's object store"),
    "transfer_queue.*": Honoured((ANY,)),
}

# The same below each of these groups.
for _role in (ACTOR, REF, "critic"):
    PPO |= {
        f"{_role}.megatron.param_offload": PARAMS,
        f"{_role}.megatron.context_parallel_size": Honoured((1, None), f"context parallelism {NEXT}"),
        f"{_role}.megatron.dynamic_context_parallel": Honoured(OFF, f"context parallelism {NEXT}"),
        f"{_role}.megatron.expert_model_parallel_size": Honoured((1, None), f"expert parallelism {NEXT}"),
        f"{_role}.megatron.expert_tensor_parallel_size": Honoured((1, None), f"expert parallelism {NEXT}"),
        f"{_role}.megatron.use_dist_checkpointing": Honoured(
            OFF, f"models start from a Hugging Face folder ({ARM}.path)"
        ),
        f"{_role}.megatron.dist_checkpointing_path": Honoured(
            (None,), f"models start from a Hugging Face folder ({ARM}.path)"
        ),
        f"{_role}.megatron.use_mbridge": Honoured((ANY,)),  # Hugging Face weights are read by plan
        f"{_role}.megatron.vanilla_mbridge": Honoured((ANY,)),
        f"{_role}.megatron.use_remove_padding": Honoured((True,), "sequences are always packed without padding"),
        f"{_role}.megatron.use_megatron_fsdp": Honoured(OFF, "use_distributed_optimizer shards the optimizer's state"),
        f"{_role}.megatron.override_ddp_config": Honoured(({}, None), f"overriding Megatron's DDP {NEXT}"),
        f"{_role}.megatron.override_ddp_config.*": Refused(f"overriding Megatron's DDP {NEXT}"),
        f"{_role}.megatron.load_weight": Honoured((True,), "start from the model folder"),
        f"{_role}.megatron.forward_only": Honoured((ANY,)),
        f"{_role}.megatron.entropy_from_logits_with_chunking": Honoured((ANY,)),
        f"{_role}.megatron.router_replay.*": Honoured((None, "disabled"), f"router replay {NEXT}"),
        f"{_role}.megatron.dist_ckpt_optim_fully_reshardable": Honoured((ANY,)),
        f"{_role}.fsdp_config.*": FSDP,
        f"{_role}.model.fsdp_config.*": FSDP,
    }

for _role in (ACTOR, "critic"):
    PPO |= {
        f"{_role}.optim.optimizer": Honoured(("adam", "adamw"), "AdamW is the only optimizer so far"),
        f"{_role}.optim.total_training_steps": Honoured((-1, None), "trainer.total_training_steps"),
        f"{_role}.optim.warmup_style": Moved(f"{_role}.optim.lr_decay_style"),
        f"{_role}.optim.lr_scheduler_type": Moved(f"{_role}.optim.lr_decay_style"),
        f"{_role}.optim.override_optimizer_config": Honoured(({}, None), f"overriding Megatron's optimizer {NEXT}"),
        f"{_role}.optim.*": Refused(f"is not a key of hybridrl's AdamW: see {_role}.optim in --help"),
    }

SFT: dict[str, Any] = {
    "engine": Honoured(("megatron",), "Megatron-core is the only training engine: engine=megatron, or leave it out"),
    "model_engine": Honoured(("megatron",), "Megatron-core is the only training engine"),
    "optim": Honoured(("megatron",), "Megatron-core is the only training engine"),
    "model.partial_pretrain": Moved("model.path"),
    "model.use_remove_padding": Honoured((True,), "samples are always packed without padding"),
    "model.enable_gradient_checkpointing": _recompute("megatron.override_transformer_config"),
    "model.lora*": Honoured((0, None), f"LoRA {NEXT}"),
    "model.strategy": Honoured(("megatron",), "Megatron-core is the only training engine"),
    "model.fsdp_config.*": FSDP,
    "use_remove_padding": Honoured((True,), "samples are always packed without padding"),
    "ulysses_sequence_parallel_size": Honoured((1, None), "megatron.sequence_parallel splits sequences"),
    "data.micro_batch_size_per_gpu": _token_budget("data.max_token_len_per_gpu"),
    "data.micro_batch_size": Honoured((None,), "set data.micro_batch_size_per_gpu or data.max_token_len_per_gpu"),
    "data.use_dynamic_bsz": Honoured((True,), "samples are always packed to data.max_token_len_per_gpu"),
    "data.pad_mode": Honoured(("no_padding",), "samples are always packed without padding"),
    "data.multiturn.enable": Honoured(OFF, f"multi-turn samples {NEXT}; data.prompt_key may hold chat messages"),
    "data.*_dict_keys": Refused("make columns of their own and name them in data.prompt_key and data.response_key"),
    "optim.total_training_steps": Honoured((-1, None), "trainer.total_training_steps"),
    "optim.lr_scheduler": Moved("optim.lr_decay_style"),
    "optim.warmup_steps_ratio": Moved("optim.lr_warmup_steps_ratio"),
    "trainer.default_hdfs_dir": Honoured((None,), "mount it and set trainer.default_local_dir"),
    "trainer.nnodes": Refused("torchrun --nnodes says it"),
    "trainer.n_gpus_per_node": Refused("torchrun --nproc_per_node says it"),
}

# verl's values for keys that hybridrl has too.
_VALUES: dict[str, dict[Any, Any]] = {
    f"{ROLLOUT}.load_format": {
        "dummy_megatron": "dummy",
        "dummy_hf": "dummy",
        "dummy_dtensor": "dummy",
        "megatron": "auto",
    },
    f"{ACTOR}.optim.lr_warmup_steps": {None: -1},
    "critic.optim.lr_warmup_steps": {None: -1},
    f"{ACTOR}.optim.min_lr": {None: 0.0},
    "critic.optim.min_lr": {None: 0.0},
    f"{ROLLOUT}.engine_kwargs.vllm": {None: {}},
    "data.apply_chat_template_kwargs": {None: {}},
    "data.val_files": {None: []},
    "algorithm.filter_groups.metric": {None: "seq_final_reward"},
    "algorithm.gdpo_reward_keys": {None: []},
    f"{ROLLOUT}.dtype": {"auto": None},
}


_THRESHOLDS = tuple(f"algorithm.rollout_correction.rollout_{kind}_threshold" for kind in ("is", "rs"))


def value_of(name: str, value: Any) -> Any:
    """A known key's value with verl's spelling of it replaced."""
    if isinstance(value, (list, dict)):
        return value
    if name in _THRESHOLDS and isinstance(value, float):
        return str(value)  # 2.0, where two bounds would be text
    return _VALUES.get(name, {}).get(value, value)


def translate(
    cls: type, unknown: dict[str, Any], known: dict[str, Any], explicit: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Sorts keys that cls does not have: (updates of known keys, keys that verl has not either, problems)."""
    from hybridrl.config import default, leaves

    table = PPO if cls is PPOConfig else SFT
    defaults = {name: default(item) for name, item in leaves(cls).items()}
    context = Context(defaults | known, explicit, cls is PPOConfig)
    updates: dict[str, Any] = {}
    left: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in unknown.items():
        rule = next((rule for pattern, rule in table.items() if fnmatchcase(name, pattern)), None)
        if rule is None:
            left[name] = value
            continue
        try:
            made = _apply(rule, name, value, context)
        except Refusal as refusal:
            problems.append(f"{name}={value}: {refusal}")
            continue
        for target, wanted in made.items():
            if target in explicit and not isinstance(wanted, dict) and context.values[target] != wanted:
                problems.append(f"{name}={value} contradicts {target}={context.values[target]}; keep one of the two")
            updates[target] = wanted
            context.values[target] = wanted
    return updates, left, problems


def _apply(rule: Any, name: str, value: Any, context: Context) -> dict[str, Any]:
    if isinstance(rule, Honoured):
        agrees = any(allowed is ANY or (value == allowed and type(value) is type(allowed)) for allowed in rule.values)
        if not agrees and not any(value == allowed for allowed in rule.values if isinstance(allowed, float)):
            raise Refusal(rule.mend)
        return {}
    if isinstance(rule, Moved):
        target, _, inside = rule.to.partition(":")
        if inside and isinstance(context.values[target], dict):
            return {} if value is None else {target: context.values[target] | {inside: value}}
        return {} if value is None else {target: value}
    if isinstance(rule, Derived):
        return rule.make(name, value, context)
    assert isinstance(rule, Refused)
    raise Refusal(rule.mend)
