"""The rules between keys: impossible values and contradictions, each with the keys' names and the mend.

What needs the machine (GPUs, CPU ranks) is `resolution.resolve`'s, what needs files is `trainer.preflight`'s. verl's
scripts set keys of features that they switch off in the same command; those are no contradiction, the plan lists them
as not used.
"""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from hybridrl import rules_algorithm
from hybridrl.config import ConfigError, PPOConfig, SFTConfig, leaves
from hybridrl.resolution import fill_megatron, mini_batch_prompts, needs_reference, own, ranks_of_actor

ARR = "actor_rollout_ref"
TRACKERS = ("console", "file", "tensorboard", "wandb", "mlflow")
WHOLE = ("model", "optimizer", "extra")  # what a checkpoint always holds

# What roles in one process have in common: Megatron's parallel state and random number generators are one a process.
SHARED = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "dtype", "seed")

# Keys that hybridrl sets in vLLM's and Megatron's own arguments, and the keys of ours that decide them.
_VLLM_OWN = {
    "model": f"{ARR}.model.path",
    "tokenizer": f"{ARR}.model.tokenizer_path",
    "logprobs_mode": None,
    "skip_tokenizer_init": None,
} | {
    name: f"{ARR}.rollout.{key}"
    for name, key in {
        "tensor_parallel_size": "tensor_model_parallel_size",
        "dtype": "dtype",
        "max_model_len": "max_model_len",
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "seed": "seed",
        "gpu_memory_utilization": "gpu_memory_utilization",
        "enforce_eager": "enforce_eager",
        "load_format": "load_format",
        "enable_prefix_caching": "enable_prefix_caching",
        "enable_chunked_prefill": "enable_chunked_prefill",
    }.items()
}
_MEGATRON_OWN = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "sequence_parallel",
    "params_dtype",
    "bf16",
    "fp16",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "variable_seq_lengths",
)

# Patterns of keys with a bound: (holds, what it must be). The first pattern that fits a leaf decides.
_POSITIVE = (lambda value: value > 0, "positive")
_COUNT_OR_ALL = (lambda value: value == -1 or value > 0, "positive, or -1")
_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_NUCLEUS = (lambda value: 0 < value <= 1, "above 0 and at most 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
_BOUNDS: list[tuple[str, tuple[Callable[[Any], bool], str]]] = [
    ("*max_samples", _COUNT_OR_ALL),
    ("*.top_k", _COUNT_OR_ALL),
    ("trainer.*_freq", _COUNT_OR_ALL),
    ("*.lr_warmup_steps", (lambda value: value >= -1, "0 or more, or -1")),
    ("*.lr_warmup_steps_ratio", _SHARE),
    ("*.lr", _NOT_NEGATIVE),
    ("*.min_lr", _NOT_NEGATIVE),
    ("*.weight_decay", _NOT_NEGATIVE),
    ("*.clip_grad", _NOT_NEGATIVE),
    ("*.top_p", _NUCLEUS),
    ("*.gpu_memory_utilization", _NUCLEUS),
    ("algorithm.gamma", _SHARE),
    ("algorithm.lam", _SHARE),
    ("*.clip_ratio_low", _SHARE),
    ("*.tau_*", _POSITIVE),
    ("*.clip_cov_ratio", _NUCLEUS),
    ("*.kl_cov_ratio", _NUCLEUS),
    ("*.ppo_kl_coef", _NOT_NEGATIVE),
    ("*.dro_beta", _POSITIVE),
    ("*.max_num_gen_batches", _NOT_NEGATIVE),
    ("*.penalty_factor", _POSITIVE),
    ("*.clip_ratio_c", (lambda value: value > 1, "above 1 (usually 3)")),
    ("*.clip_ratio*", _NOT_NEGATIVE),
    ("*.kl_loss_coef", _NOT_NEGATIVE),
    ("*.kl_coef", _NOT_NEGATIVE),
    ("*.val_kwargs.temperature", _NOT_NEGATIVE),
    (
        "*.rollout.temperature",
        (lambda value: value > 0, "above 0: greedy rollouts leave nothing to learn from (a very low value is 0.01)"),
    ),
    ("*seed", _NOT_NEGATIVE),
    ("trainer.critic_warmup", _NOT_NEGATIVE),
    ("trainer.log_val_generations", _NOT_NEGATIVE),
    ("*.cliprange_value", _POSITIVE),
    ("*.loss_scale_factor", _POSITIVE),
    ("*.target_kl", _POSITIVE),
    ("*.timeout", _POSITIVE),
    ("*.cpu_kvcache_gib", _POSITIVE),
]
_FREE_FLOATS = ("*.entropy_coeff", "*.betas", "*.clip_cov_[lu]b")


def check(config: PPOConfig | SFTConfig) -> None:
    """ConfigError with every rule that the configuration breaks."""
    problems = list(_bounds(config))
    if not problems:  # rules that compute with the values come after their bounds
        rules = _SFT_RULES if isinstance(config, SFTConfig) else _PPO_RULES
        problems = [problem for rule in rules for problem in rule(config)]
    if problems:
        raise ConfigError(*problems)


def get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _bounds(config: Any) -> Iterator[str]:
    for name in leaves(type(config)):
        value = get(config, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or any(fnmatchcase(name, free) for free in _FREE_FLOATS)
        ):
            continue
        found = next((bound for pattern, bound in _BOUNDS if fnmatchcase(name, pattern)), None)
        assert found or isinstance(value, int), f"{name}: a float needs a bound in rules._BOUNDS"
        holds, what = found or _POSITIVE
        if not holds(value):
            yield f"{name}={value}: must be {what}"


def _data(config: PPOConfig) -> Iterator[str]:
    data, trainer = config.data, config.trainer
    if not data.train_files:
        yield "data.train_files: name at least one Parquet file with training prompts"
    if not data.val_files:
        for key, wanted in (("test_freq", trainer.test_freq > 0), ("val_only", trainer.val_only)):
            if wanted:
                yield (
                    f"trainer.{key}={get(trainer, key)} and data.val_files is empty: name the files, or leave"
                    f" trainer.{key} out"
                )
    if not config.actor_rollout_ref.model.path:
        yield f"{ARR}.model.path: name the Hugging Face folder of the model to train"


def _batches(config: PPOConfig) -> Iterator[str]:
    actor, critic, prompts = config.actor_rollout_ref.actor, config.critic, config.data.train_batch_size
    n, mini = config.actor_rollout_ref.rollout.n, mini_batch_prompts(config)
    sizes = [(f"{ARR}.actor", mini, actor.megatron, ranks_of_actor(config))]
    if _with_critic(config) and (critic.ppo_mini_batch_size or config.trainer.placement.critic):
        ranks = own(config.trainer.placement.critic, ranks_of_actor(config))
        sizes.append(("critic", own(critic.ppo_mini_batch_size, mini), critic.megatron, ranks))
    base = fill_megatron(actor.megatron)
    for role, size, megatron, ranks in sizes:
        name = f"{role}.ppo_mini_batch_size={size}"
        if prompts % size:
            near = max((d for d in range(1, min(size, prompts) + 1) if prompts % d == 0), default=prompts)
            yield f"{name} does not divide data.train_batch_size={prompts}: both count prompts; {near} would do"
        filled = fill_megatron(megatron, base)
        dp = ranks // (filled.tensor_model_parallel_size * filled.pipeline_model_parallel_size)
        if 0 < size * n < dp:
            yield (
                f"{name} x {ARR}.rollout.n={n} = {size * n} samples a mini-batch, fewer than the {dp} data-parallel"
                " ranks; raise it, or lower trainer.n_gpus_per_node"
            )
    dynamic, micro = actor.use_dynamic_bsz, actor.ppo_micro_batch_size_per_gpu
    if dynamic and micro is not None:
        yield (
            f"{ARR}.actor.use_dynamic_bsz=true and {ARR}.actor.ppo_micro_batch_size_per_gpu={micro} contradict: with "
            "the first, ppo_max_token_len_per_gpu sizes micro-batches; leave one out"
        )
    if dynamic is False and micro is None:
        yield f"{ARR}.actor.use_dynamic_bsz=false needs {ARR}.actor.ppo_micro_batch_size_per_gpu"


def _lengths(config: PPOConfig) -> Iterator[str]:
    data, arr = config.data, config.actor_rollout_ref
    longest = data.max_prompt_length + data.max_response_length
    total = f"data.max_prompt_length + data.max_response_length = {longest}"
    budget = arr.actor.ppo_max_token_len_per_gpu
    budgets = {
        f"{ARR}.actor.ppo_max_token_len_per_gpu": budget if arr.actor.ppo_micro_batch_size_per_gpu is None else None,
        f"{ARR}.rollout.log_prob_max_token_len_per_gpu": arr.rollout.log_prob_max_token_len_per_gpu,
        f"{ARR}.ref.log_prob_max_token_len_per_gpu": arr.ref.log_prob_max_token_len_per_gpu,
        "critic.ppo_max_token_len_per_gpu": config.critic.ppo_max_token_len_per_gpu,
        f"{ARR}.rollout.max_model_len": arr.rollout.max_model_len,
    }
    for name, value in budgets.items():
        if value is not None and value < longest:
            yield f"{name}={value} is less than {total}: the longest sample would not fit; raise it"
    rollout = arr.rollout
    model_len = own(rollout.max_model_len, longest)
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < model_len:
        yield (
            f"{ARR}.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens} is less than a sequence of"
            f" {model_len} tokens: raise it, or set {ARR}.rollout.enable_chunked_prefill=true"
        )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        yield (
            f"{ARR}.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens} is less than max_num_seqs="
            f"{rollout.max_num_seqs}: each decoding sequence takes a token of a step"
        )


def _with_critic(config: PPOConfig) -> bool:
    found = rules_algorithm.find_estimator(config)
    return bool(own(config.critic.enable, found is not None and "values" in found.needs))


def _loss(config: PPOConfig) -> Iterator[str]:
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    if actor.use_kl_loss and actor.kl_loss_coef == 0:
        yield (
            f"{ARR}.actor.use_kl_loss=true and kl_loss_coef=0: a reference would run for nothing; raise the one or drop"
            " the other"
        )
    if algorithm.use_kl_in_reward and algorithm.kl_ctrl.kl_coef == 0:
        yield (
            "algorithm.use_kl_in_reward=true and algorithm.kl_ctrl.kl_coef=0: raise the coefficient or set"
            " use_kl_in_reward=false"
        )
    modes = {actor.loss_agg_mode, own(config.critic.loss_agg_mode, actor.loss_agg_mode)}
    if actor.loss_scale_factor is not None and "seq-mean-token-sum-norm" not in modes:
        yield (
            f"{ARR}.actor.loss_scale_factor={actor.loss_scale_factor:g} divides only in"
            f" loss_agg_mode=seq-mean-token-sum-norm, and {ARR}.actor.loss_agg_mode={actor.loss_agg_mode}"
        )
    saved = actor.checkpoint.save_contents
    if wrong := [item for item in saved if item not in (*WHOLE, "hf_model")]:
        yield f"{ARR}.actor.checkpoint.save_contents={wrong}: choose from {', '.join(WHOLE)}, hf_model"
    elif missing := [item for item in WHOLE if item not in saved]:
        yield (
            f"{ARR}.actor.checkpoint.save_contents={saved} lacks {', '.join(missing)}: a run goes on from whole"
            " checkpoints only"
        )


def _optim(config: Any) -> Iterator[str]:
    roles = ("",) if isinstance(config, SFTConfig) else (f"{ARR}.actor.", "critic.")
    for role in roles:
        optim = get(config, f"{role}optim")
        if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
            yield f"{role}optim.betas={optim.betas}: two numbers, each at least 0 and below 1"
        if optim.lr_warmup_steps >= 0 and optim.lr_warmup_steps_ratio > 0:
            yield f"{role}optim.lr_warmup_steps and lr_warmup_steps_ratio both set the warm-up; keep one"
        if optim.min_lr > 0 and optim.lr_decay_style == "constant":
            yield (
                f"{role}optim.min_lr={optim.min_lr:g} and lr_decay_style=constant, which never decays; choose linear or"
                " cosine"
            )
        elif optim.min_lr > optim.lr:
            yield f"{role}optim.min_lr={optim.min_lr:g} is above {role}optim.lr={optim.lr:g}"


def _sampling(config: PPOConfig) -> Iterator[str]:
    val = config.actor_rollout_ref.rollout.val_kwargs
    name = f"{ARR}.rollout.val_kwargs"
    if val.do_sample and val.temperature == 0:
        yield (
            f"{name}.do_sample=true and {name}.temperature=0: set a temperature above 0, or do_sample=false for greedy"
        )
    if not val.do_sample:
        if val.temperature > 0:
            yield (
                f"{name}.temperature={val.temperature:g} and {name}.do_sample=false, which is greedy; set"
                " do_sample=true"
            )
        if val.n > 1:
            yield (
                f"{name}.n={val.n} and {name}.do_sample=false: greedy samples are all alike; set do_sample=true and a"
                " temperature"
            )
    for key in config.actor_rollout_ref.rollout.engine_kwargs.vllm:
        if key in _VLLM_OWN:
            mend = f"set {_VLLM_OWN[key]}" if _VLLM_OWN[key] else "hybridrl needs its own value there"
            yield f"{ARR}.rollout.engine_kwargs.vllm.{key}: {mend}"


def _parallelism(config: PPOConfig) -> Iterator[str]:
    actor, pools, ranks = config.actor_rollout_ref.actor.megatron, config.trainer.placement, ranks_of_actor(config)
    base = fill_megatron(actor)
    yield from _split(f"{ARR}.actor", base, ranks, f"the {ranks} ranks of trainer.n_gpus_per_node x trainer.nnodes")
    roles = (
        ("critic", "critic", config.critic.megatron, pools.critic, _with_critic(config)),
        (f"{ARR}.ref", "ref", config.actor_rollout_ref.ref.megatron, pools.ref, needs_reference(config)),
    )
    for role, short, megatron, pool, used in roles:
        if pool is not None and not used:
            yield (
                f"trainer.placement.{short}={pool} and this run has no"
                f" {'critic' if short == 'critic' else 'reference'}; leave it out"
            )
        if not used:
            continue
        filled = fill_megatron(megatron, base)
        if pool is not None:
            yield from _split(role, filled, pool, f"the {pool} ranks of trainer.placement.{short}")
            continue
        set_here = [name.rsplit(".", 1)[1] for name in config.explicit if name.startswith(f"{role}.megatron.")]
        for key in [key for key in SHARED if key in set_here]:
            if get(megatron, key) is not None and get(filled, key) != get(base, key):
                yield (
                    f"{role}.megatron.{key}={get(filled, key)} differs from"
                    f" {ARR}.actor.megatron.{key}={get(base, key)}, and both share processes: leave the first out, or"
                    f" give the role ranks of its own with trainer.placement.{short}"
                )
    for role, megatron in (
        (f"{ARR}.actor", actor),
        (f"{ARR}.ref", config.actor_rollout_ref.ref.megatron),
        ("critic", config.critic.megatron),
    ):
        yield from _virtual(f"{role}.megatron", fill_megatron(megatron, base))
        yield from _overrides(f"{role}.megatron", megatron)


def _split(role: str, megatron: Any, ranks: int, of: str) -> Iterator[str]:
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    if ranks % (tp * pp):
        yield (
            f"{role}.megatron.tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} = {tp * pp} does not"
            f" divide {of}"
        )


def _virtual(name: str, filled: Any) -> Iterator[str]:
    chunks = filled.virtual_pipeline_model_parallel_size
    if chunks > 1 and filled.pipeline_model_parallel_size == 1:
        yield (
            f"{name}.virtual_pipeline_model_parallel_size={chunks} needs pipeline stages to interleave; set"
            f" {name}.pipeline_model_parallel_size above 1, or leave it out"
        )


def _overrides(name: str, megatron: Any) -> Iterator[str]:
    for key in megatron.override_transformer_config:
        if key in _MEGATRON_OWN:
            yield (
                f"{name}.override_transformer_config.{key}: comes from the model's config.json or from {name}; leave"
                " it out"
            )


def _trainer(config: PPOConfig) -> Iterator[str]:
    trainer = config.trainer
    yield from _trackers(trainer.logger)
    if trainer.executor != "ray":
        if (engines := config.actor_rollout_ref.rollout.num_replicas or 1) > 1:
            yield (
                f"trainer.executor={trainer.executor} has one engine and {ARR}.rollout.num_replicas={engines}; leave"
                " one out"
            )
        if trainer.executor == "local" and ranks_of_actor(config) > 1:
            yield (
                f"trainer.executor=local is one process, and trainer.n_gpus_per_node={trainer.n_gpus_per_node} x"
                f" trainer.nnodes={trainer.nnodes} asks for {ranks_of_actor(config)}: set both to 1"
            )
        for key in ("critic", "ref", "rollout"):
            if get(trainer.placement, key) is not None:
                yield (
                    f"trainer.placement.{key} and trainer.executor={trainer.executor}, which has one pool; leave one"
                    " out"
                )
    if trainer.debug and trainer.val_only:
        yield f"trainer.debug={trainer.debug} has no validation: leave out trainer.val_only"
    if trainer.resume_mode == "resume_path" and not trainer.resume_from_path:
        yield "trainer.resume_mode=resume_path needs trainer.resume_from_path=.../global_step_N"
    if trainer.resume_mode != "resume_path" and trainer.resume_from_path:
        yield f"trainer.resume_from_path is read with trainer.resume_mode=resume_path, which is {trainer.resume_mode}"
    custom = config.custom_reward_function
    if custom.path is None and "custom_reward_function.name" in config.explicit and custom.name != "compute_score":
        yield f"custom_reward_function.name={custom.name} and no custom_reward_function.path: name its file"


def _trackers(logger: list[str]) -> Iterator[str]:
    if wrong := [name for name in logger if name not in TRACKERS]:
        yield f"trainer.logger={wrong}: choose from {', '.join(TRACKERS)} (metrics.jsonl is always written)"


def _sft(config: SFTConfig) -> Iterator[str]:
    if not config.data.train_files:
        yield "data.train_files: name at least one Parquet file with samples"
    if not config.model.path:
        yield "model.path: name the Hugging Face folder of the model to train"
    if config.data.max_token_len_per_gpu < config.data.max_length:
        yield (
            f"data.max_token_len_per_gpu={config.data.max_token_len_per_gpu} is less than"
            f" data.max_length={config.data.max_length}: the longest sample would not fit; raise it"
        )
    if config.trainer.test_freq > 0 and not config.data.val_files:
        yield (
            f"trainer.test_freq={config.trainer.test_freq} and data.val_files is empty: name the files, or leave it out"
        )
    yield from _trackers(config.trainer.logger)
    yield from _virtual("megatron", fill_megatron(config.megatron))
    yield from _overrides("megatron", config.megatron)


_PPO_RULES = (_data, _batches, _lengths, *rules_algorithm.RULES, _loss, _optim, _sampling, _parallelism, _trainer)
_SFT_RULES = (_sft, _optim)
