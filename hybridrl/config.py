"""Every key hybridrl knows, its default and its meaning. The only place where a default is written, together with
config_algorithm.py, which holds the algorithms' groups.

Key names are verl's, so that its users' commands run unchanged. A field's `doc` is printed by `--help` and becomes
docs/config_keys.md (`python -m hybridrl.config`). None means "derived": the comment says from what. The objects are
frozen; `configuration.build` makes them from what Hydra composed and `configuration.check` holds every rule between
keys.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hybridrl.config_algorithm import Algorithm, Kl, PolicyLoss, RewardKwargs
from hybridrl.config_leaf import key, node

LossAgg = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
TrainDtype = Literal["bfloat16", "float32"]
Dtype = Literal["bfloat16", "float16", "float32"]


class ConfigError(ValueError):
    """What the user has to mend, all of it at once: `.problems` holds one sentence a problem, each naming its keys."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        listed = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{listed}")

    def __reduce__(self):  # pickled between processes: the default would pass the joined text for one problem
        return type(self), tuple(self.problems)


def explicit_keys() -> Any:
    """The dotted keys that the user has set, so that a rule can tell a choice from a default. Not a key itself."""
    return field(default=frozenset(), repr=False, compare=False)


@dataclass(frozen=True)
class Data:
    train_files: list[str] = key(
        [], "Parquet files (one or a list) with the training prompts, verl's schema. Required."
    )
    val_files: list[str] = key([], "Parquet files with the validation prompts. Empty: no validation.")
    train_batch_size: int = key(1024, "Prompts a step.")
    max_prompt_length: int = key(512, "Longest prompt in tokens; see truncation and filter_overlong_prompts.")
    max_response_length: int = key(512, "Most tokens a response may have.")
    truncation: Literal["error", "left", "right", "middle"] = key(
        "error", "What happens to a longer prompt: an error, or the end / the start / both ends are kept."
    )
    filter_overlong_prompts: bool = key(False, "Drop prompts longer than max_prompt_length before training.")
    prompt_key: str = key("prompt", "Column with the chat messages.")
    reward_fn_key: str = key("data_source", "Column that picks the reward function.")
    shuffle: bool = key(True, "New order of the prompts each epoch.")
    seed: int | None = key(None, "Seed of that order. None: 1.")
    train_max_samples: int = key(-1, "Use only so many training rows (-1: all).")
    val_max_samples: int = key(-1, "Use only so many validation rows (-1: all).")
    apply_chat_template_kwargs: dict = key(
        {}, "Passed to the tokenizer's chat template, e.g. {enable_thinking: false}."
    )


@dataclass(frozen=True)
class Model:
    path: str = key("", "Hugging Face folder (config.json, *.safetensors, tokenizer). Required for the actor.")
    tokenizer_path: str | None = key(None, "Tokenizer folder. None: the model's.")
    trust_remote_code: bool = key(False, "Let transformers run code that the model folder brings.")


@dataclass(frozen=True)
class CriticModel:
    path: str | None = key(None, "Hugging Face folder of the critic's backbone. None: the actor's.")
    trust_remote_code: bool = key(False, "Let transformers run code that the model folder brings.")


@dataclass(frozen=True)
class Optim:
    lr: float = key(1e-6, "Learning rate.")
    lr_warmup_steps: int = key(-1, "Steps of linear warm-up (-1: from lr_warmup_steps_ratio).")
    lr_warmup_steps_ratio: float = key(0.0, "Share of all training steps spent in warm-up.")
    lr_decay_style: Literal["constant", "linear", "cosine"] = key("constant", "Shape of the decay after warm-up.")
    min_lr: float = key(0.0, "Where the decay ends.")
    weight_decay: float = key(0.01, "AdamW's decoupled weight decay (not on biases and norms).")
    betas: list[float] = key([0.9, 0.999], "AdamW's decay rates.")
    clip_grad: float = key(1.0, "Largest global gradient norm (0: no clipping).")


@dataclass(frozen=True)
class CriticOptim(Optim):
    lr: float = key(1e-5, "Learning rate.")


@dataclass(frozen=True)
class Parallel:
    """How Megatron builds and splits a model; all that a forward-only role needs."""

    tensor_model_parallel_size: int | None = key(None, "Tensor parallelism. None: the actor's; the actor's own: 1.")
    pipeline_model_parallel_size: int | None = key(None, "Pipeline stages. None: the actor's; the actor's own: 1.")
    virtual_pipeline_model_parallel_size: int | None = key(
        None,
        "Chunks of layers a pipeline stage holds (interleaved schedule). None: the actor's; the actor's own: 1.",
    )
    sequence_parallel: bool | None = key(
        None, "Sequence parallelism. None: the actor's; the actor's own: on when TP > 1."
    )
    dtype: TrainDtype | None = key(
        None, "Dtype of the weights in training. None: the actor's; the actor's own: bfloat16."
    )
    transformer_impl: Literal["auto", "transformer_engine", "local"] = key(
        "auto",
        "Transformer Engine's layers, or Megatron's local ones with PyTorch's packed attention. auto: TE if installed.",
    )
    override_transformer_config: dict = key(
        {}, "Any further field of Megatron's TransformerConfig, e.g. recompute_granularity."
    )


@dataclass(frozen=True)
class Trained(Parallel):
    """A model with an optimizer."""

    use_distributed_optimizer: bool = key(True, "Shard the optimizer's state over data-parallel ranks.")
    seed: int = key(42, "Seed of the random number generators on the ranks.")


@dataclass(frozen=True)
class Megatron(Trained):
    """One that shares its GPUs with a rollout engine."""

    grad_offload: bool = key(False, "Free the gradient buffers while the rollout engine has the GPU.")
    optimizer_offload: bool = key(
        False, "Keep the optimizer's state in host memory while the rollout engine has the GPU."
    )


@dataclass(frozen=True)
class ActorCheckpoint:
    save_contents: list[str] = key(
        ["model", "optimizer", "extra"], "All three, always; add hf_model to export a Hugging Face folder at each save."
    )


@dataclass(frozen=True)
class Actor:
    ppo_mini_batch_size: int = key(256, "Prompts of one optimizer step (times rollout.n samples).")
    ppo_epochs: int = key(1, "Passes over each step's samples.")
    shuffle: bool = key(False, "New mini-batches in each of the ppo_epochs.")
    data_loader_seed: int = key(42, "Seed of that shuffle.")
    use_dynamic_bsz: bool | None = key(
        None, "Micro-batches by token budget (default) or, if false, by ppo_micro_batch_size_per_gpu."
    )
    ppo_max_token_len_per_gpu: int = key(16384, "Token budget of a micro-batch.")
    ppo_micro_batch_size_per_gpu: int | None = key(None, "Samples of a micro-batch; only with use_dynamic_bsz=false.")
    clip_ratio: float = key(0.2, "PPO's clip range, both sides.")
    clip_ratio_low: float | None = key(None, "Lower clip range. None: clip_ratio.")
    clip_ratio_high: float | None = key(None, "Upper clip range. None: clip_ratio.")
    clip_ratio_c: float = key(3.0, "Dual clip's bound for negative advantages (dppo_*: the largest ratio).")
    tau_pos: float = key(1.0, "sapo: sharpness of the gate where the advantage is positive.")
    tau_neg: float = key(1.05, "sapo: and elsewhere.")
    loss_agg_mode: LossAgg = key("token-mean", "How token losses become one number.")
    loss_scale_factor: float | None = key(None, "Divisor of seq-mean-token-sum-norm. None: data.max_response_length.")
    entropy_coeff: float = key(0.0, "Weight of the entropy bonus.")
    use_kl_loss: bool = key(False, "Add a KL term against the reference to the loss (needs a reference).")
    kl_loss_coef: float = key(0.001, "Its weight.")
    kl_loss_type: Kl = key("low_var_kl", "Its estimator.")
    policy_loss: PolicyLoss = node(PolicyLoss)
    optim: Optim = node(Optim)
    megatron: Megatron = node(Megatron)
    checkpoint: ActorCheckpoint = node(ActorCheckpoint)


@dataclass(frozen=True)
class Ref:
    log_prob_max_token_len_per_gpu: int | None = key(
        None, "Token budget of a forward-only pass. None: actor.ppo_max_token_len_per_gpu."
    )
    megatron: Parallel = node(Parallel)


@dataclass(frozen=True)
class ValKwargs:
    n: int = key(1, "Samples a validation prompt.")
    do_sample: bool = key(False, "Sample in validation; greedy if false.")
    temperature: float = key(0.0, "Temperature when do_sample.")
    top_p: float = key(1.0, "Nucleus when do_sample.")
    top_k: int = key(-1, "Top-k when do_sample.")


@dataclass(frozen=True)
class EngineKwargs:
    vllm: dict = key({}, "Any further argument of vLLM's AsyncEngineArgs.")


@dataclass(frozen=True)
class Rollout:
    name: Literal["vllm"] = key("vllm", "Rollout engine.")
    n: int = key(1, "Samples a prompt (the group's size for GRPO and RLOO).")
    temperature: float = key(1.0, "Sampling temperature, also applied to the trainer's log-probs.")
    top_p: float = key(1.0, "Nucleus sampling (1: off).")
    top_k: int = key(-1, "Top-k sampling (-1: off).")
    seed: int = key(0, "Request seeds derive from (seed, uid, sample, step).")
    tensor_model_parallel_size: int | None = key(None, "vLLM's tensor parallelism. None: 1.")
    num_replicas: int | None = key(
        None, "vLLM engines. None: one on CPU; GPUs of the pool / tensor_model_parallel_size on GPUs."
    )
    dtype: Dtype | None = key(None, "vLLM's weights. None: the actor's megatron.dtype.")
    gpu_memory_utilization: float = key(
        0.5, "Share of each GPU that vLLM may take while generating. Not applicable on CPU."
    )
    cpu_kvcache_gib: float = key(1.0, "Size of vLLM's KV cache on CPU.")
    max_model_len: int | None = key(None, "None: data.max_prompt_length + data.max_response_length.")
    max_num_seqs: int = key(256, "Sequences that decode together.")
    max_num_batched_tokens: int = key(8192, "Tokens of one engine step.")
    enforce_eager: bool | None = key(None, "No compilation, no CUDA graphs. None: true on CPU, false on GPUs.")
    enable_prefix_caching: bool = key(
        True, "Reuse the KV cache of shared prompt prefixes (dropped at each weight update)."
    )
    enable_chunked_prefill: bool = key(True, "Mix prefill chunks with decoding. Off on CPU.")
    free_cache_engine: bool = key(True, "Put vLLM to sleep while training (where the platform can).")
    load_format: Literal["dummy", "auto", "safetensors"] = key(
        "dummy", "dummy: start with random weights and take the trainer's."
    )
    log_prob_max_token_len_per_gpu: int | None = key(
        None, "Token budget of the old-log-prob pass. None: the actor's, whose packing it then shares."
    )
    log_ppl_check: bool = key(True, "After each update compare the trainer's and vLLM's log-probs of the same tokens.")
    val_kwargs: ValKwargs = node(ValKwargs)
    engine_kwargs: EngineKwargs = node(EngineKwargs)


@dataclass(frozen=True)
class ActorRolloutRef:
    model: Model = node(Model)
    actor: Actor = node(Actor)
    ref: Ref = node(Ref)
    rollout: Rollout = node(Rollout)


@dataclass(frozen=True)
class Critic:
    enable: bool | None = key(None, "None: on when the estimator needs values (gae).")
    ppo_mini_batch_size: int | None = key(None, "Prompts of one optimizer step. None: the actor's.")
    ppo_epochs: int | None = key(None, "Passes over each step's samples. None: the actor's.")
    ppo_max_token_len_per_gpu: int | None = key(None, "Token budget of a micro-batch. None: the actor's.")
    cliprange_value: float = key(0.5, "Clip range of the value update.")
    loss_agg_mode: LossAgg | None = key(None, "How token losses become one number. None: the actor's.")
    model: CriticModel = node(CriticModel)
    optim: CriticOptim = node(CriticOptim)
    megatron: Megatron = node(Megatron)


@dataclass(frozen=True)
class CustomReward:
    path: str | None = key(None, "Python file with a reward function, or its import path, package.module:function.")
    name: str = key("compute_score", "Its name: f(data_source, solution_str, ground_truth, extra_info=None).")


@dataclass(frozen=True)
class Reward:
    num_workers: int = key(8, "Processes that score responses (bounded by the machine's cores).")
    timeout: float = key(10.0, "Seconds a sample may take before it counts as failed.")
    reward_kwargs: RewardKwargs = node(RewardKwargs)


@dataclass(frozen=True)
class Placement:
    critic: int | None = key(None, "Ranks of a pool of the critic's own. None: shares the actor's processes.")
    ref: int | None = key(None, "Ranks of a pool of the reference's own. None: shares the actor's processes.")
    rollout: int | None = key(None, "GPUs (CPU: replicas) of a pool of the rollout's own. None: shares the actor's.")


@dataclass(frozen=True)
class Trainer:
    project_name: str = key("verl_examples", "Names the run folder and the trackers' project.")
    experiment_name: str = key("gsm8k", "Names the run folder and the trackers' run.")
    default_local_dir: str | None = key(None, "Run folder. None: checkpoints/PROJECT/EXPERIMENT.")
    logger: list[str] = key(
        ["console"], "Trackers: console, file, tensorboard, wandb, mlflow. metrics.jsonl is always written."
    )
    device: Literal["auto", "cuda", "cpu"] = key("auto", "Where training runs. auto: CUDA if a GPU is there.")
    executor: Literal["ray", "local", "torchrun"] = key(
        "ray", "ray; torchrun: its ranks, rank 0 drives; local: one process, one rank, no Ray, for a debugger."
    )
    debug: Literal["rollout", "train", "replay"] | None = key(
        None,
        "rollout: only generate, with model.path's weights, and write rollout_data_dir; train: train on the tables in"
        " rollout_data_dir, without vLLM; replay: the same with rewards computed anew. No validation in all three.",
    )
    n_gpus_per_node: int = key(8, "Training ranks a node (GPUs; on CPU, processes).")
    nnodes: int = key(1, "Nodes.")
    cpu_ranks_max: int = key(8, "On CPU: the most ranks that n_gpus_per_node may ask for.")
    placement: Placement = node(Placement)
    total_epochs: int = key(30, "Passes over the training prompts.")
    total_training_steps: int | None = key(None, "Steps. None: total_epochs worth of them.")
    critic_warmup: int = key(0, "Steps in which only the critic learns.")
    balance_batch: bool = key(True, "Even out the compute over data-parallel ranks.")
    val_before_train: bool = key(True, "Validate before the first step.")
    val_only: bool = key(False, "Validate and end.")
    test_freq: int = key(-1, "Validate every so many steps and after the last one (-1: never).")
    save_freq: int = key(-1, "Save a checkpoint every so many steps and after the last one (-1: never).")
    max_actor_ckpt_to_keep: int | None = key(None, "Keep only the newest so many checkpoints.")
    resume_mode: Literal["auto", "disable", "resume_path"] = key(
        "auto", "auto: go on from the newest whole checkpoint."
    )
    resume_from_path: str | None = key(None, "The global_step_N folder for resume_path.")
    log_val_generations: int = key(0, "Validation samples printed each time.")
    rollout_data_dir: str | None = key(None, "Where each step's rollouts go as Parquet. None: RUN/rollouts.")
    report: bool = key(True, "Write report.html at the end.")


@dataclass(frozen=True)
class RayInit:
    num_cpus: int | None = key(None, "CPUs of a local Ray. None: Ray's own count, but enough for the ranks.")
    address: str | None = key(None, "Cluster to join, or auto. None: RAY_ADDRESS, else a local Ray starts.")


@dataclass(frozen=True)
class RayKwargs:
    ray_init: RayInit = node(RayInit)


@dataclass(frozen=True)
class PPOConfig:
    data: Data = node(Data)
    actor_rollout_ref: ActorRolloutRef = node(ActorRolloutRef)
    critic: Critic = node(Critic)
    algorithm: Algorithm = node(Algorithm)
    custom_reward_function: CustomReward = node(CustomReward)
    reward: Reward = node(Reward)
    trainer: Trainer = node(Trainer)
    ray_kwargs: RayKwargs = node(RayKwargs)
    explicit: frozenset[str] = explicit_keys()


@dataclass(frozen=True)
class SFTData:
    train_files: list[str] = key([], "Parquet files with a prompt and a response column. Required.")
    val_files: list[str] = key([], "Parquet files for the validation loss. Empty: none.")
    train_batch_size: int = key(256, "Samples a step.")
    max_length: int = key(1024, "Longest sample in tokens; longer ones are an error or cut on the right.")
    truncation: Literal["error", "right"] = key("error", "What happens to a longer sample.")
    prompt_key: str = key("prompt", "Column with the chat messages or the user's text.")
    response_key: str = key("response", "Column with the answer.")
    max_token_len_per_gpu: int = key(16384, "Token budget of a micro-batch.")
    seed: int = key(1, "Seed of the order of the samples.")
    train_max_samples: int = key(-1, "Use only so many rows (-1: all).")


@dataclass(frozen=True)
class SFTOptim(Optim):
    lr: float = key(1e-5, "Learning rate.")


@dataclass(frozen=True)
class SFTTrainer:
    project_name: str = key("gsm8k-sft", "Names the run folder and the trackers' project.")
    experiment_name: str = key("test", "Names the run folder and the trackers' run.")
    default_local_dir: str | None = key(None, "Run folder. None: checkpoints/PROJECT/EXPERIMENT.")
    logger: list[str] = key(["console"], "Trackers: console, file, tensorboard, wandb, mlflow.")
    device: Literal["auto", "cuda", "cpu"] = key("auto", "Where training runs. auto: CUDA if a GPU is there.")
    total_epochs: int = key(1, "Passes over the samples.")
    total_training_steps: int | None = key(None, "Steps. None: total_epochs worth of them.")
    test_freq: int = key(-1, "Validation loss every so many steps (-1: at the end).")


@dataclass(frozen=True)
class SFTConfig:
    data: SFTData = node(SFTData)
    model: Model = node(Model)
    optim: SFTOptim = node(SFTOptim)
    megatron: Trained = node(Trained)
    trainer: SFTTrainer = node(SFTTrainer)
    explicit: frozenset[str] = explicit_keys()


def leaves(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every leaf below a config class: dotted key -> its dataclasses.Field."""
    found: dict[str, Any] = {}
    for item in fields(cls):
        if is_dataclass(item.type):
            found.update(leaves(item.type, f"{prefix}{item.name}."))
        elif "doc" in item.metadata:
            found[prefix + item.name] = item
    return found


def default(item: Any) -> Any:
    """The default of a leaf's dataclasses.Field."""
    return item.default_factory() if callable(item.default_factory) else item.default


def inner_type(item: Any) -> tuple[Any, bool]:
    """A leaf's type without None, and whether it may be None."""
    kinds = get_args(item.type) if get_origin(item.type) in (Union, UnionType) else (item.type,)
    inner = [kind for kind in kinds if kind is not type(None)]
    assert len(inner) == 1, f"{item.name}: a leaf has one type and may be None"
    return inner[0], len(kinds) > 1


def kind_of(item: Any) -> str:
    """A leaf's type for people: `int`, `list of str`, `cpu or cuda`, `float or null`."""
    kind, nullable = inner_type(item)
    if get_origin(kind) is Literal:
        name = " or ".join(str(choice) for choice in get_args(kind))
    elif get_origin(kind) is list:
        name = f"list of {get_args(kind)[0].__name__}"
    else:
        name = kind.__name__
    return name + (" or null" if nullable else "")


def markdown() -> str:
    """The page of configuration keys (docs/config_keys.md)."""
    lines = [
        "# Configuration keys",
        "",
        "Made by `make docs` from the dataclasses in `hybridrl/config.py` and `hybridrl/config_algorithm.py`, the only",
        "place where a default is written.",
    ]
    for title, cls in (("hybridrl.trainer.main_ppo", PPOConfig), ("hybridrl.trainer.main_sft", SFTConfig)):
        lines += ["", f"## `python -m {title}`", "", "| key | default | type | meaning |", "|---|---|---|---|"]
        for name, item in leaves(cls).items():
            value = default(item)
            kind, doc = kind_of(item).replace("|", "\\|"), item.metadata["doc"].replace("|", "\\|")
            shown = "null" if value is None else "''" if value == "" else value
            lines.append(f"| `{name}` | `{shown}` | {kind} | {doc} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
