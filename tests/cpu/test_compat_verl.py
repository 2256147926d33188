"""verl's keys: command lines in the style of its run scripts, and each table entry's answer."""

from fnmatch import fnmatchcase

import pytest

from hybridrl import compat_verl
from hybridrl.compat_verl import ACTOR, PPO, REF, ROLLOUT, SFT, Derived, Honoured, Moved, Refused
from hybridrl.config import ConfigError, PPOConfig, SFTConfig, leaves
from hybridrl.configuration import Machine, build, check, load, resolve
from hybridrl.rules import get

NODE = Machine("cuda", 8, 64, 512.0)

# PPO on two data sets at TP 2 x PP 2, a critic, samples a micro-batch.
PPO_SCRIPT = [
    "--config-path=./config",
    "--config-name=ppo_megatron_trainer.yaml",
    "algorithm.adv_estimator=gae",
    "data.train_files=['/data/gsm8k/train.parquet', '/data/math/train.parquet']",
    "data.val_files=['/data/gsm8k/test.parquet', '/data/math/test.parquet']",
    "data.train_batch_size=1024",
    "data.max_prompt_length=1024",
    "data.max_response_length=512",
    "data.filter_overlong_prompts=True",
    "data.truncation=error",
    "actor_rollout_ref.model.path=/models/qwen2",
    "actor_rollout_ref.actor.optim.lr=1e-6",
    "actor_rollout_ref.actor.ppo_mini_batch_size=256",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2",
    "actor_rollout_ref.actor.use_kl_loss=False",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=4",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
    "actor_rollout_ref.ref.megatron.pipeline_model_parallel_size=2",
    "actor_rollout_ref.ref.megatron.tensor_model_parallel_size=2",
    "critic.optim.lr=1e-5",
    "critic.model.path=/models/qwen2",
    "critic.model.enable_gradient_checkpointing=False",
    "critic.ppo_micro_batch_size_per_gpu=4",
    "algorithm.use_kl_in_reward=False",
    "trainer.critic_warmup=0",
    "trainer.logger=[console,tensorboard]",
    "trainer.n_gpus_per_node=8",
    "trainer.nnodes=1",
    "trainer.save_freq=20",
    "trainer.test_freq=5",
    "trainer.total_epochs=100",
]

# GRPO with dynamic batches, KL in the loss, older and newer spellings together.
GRPO_SCRIPT = [
    "model_engine=megatron",
    "algorithm.adv_estimator=grpo",
    "data.train_files=/data/train.parquet",
    "data.val_files=/data/test.parquet",
    "data.return_raw_chat=True",
    "data.train_batch_size=128",
    "data.val_batch_size=1312",
    "data.max_prompt_length=512",
    "data.max_response_length=1024",
    "actor_rollout_ref.model.path=/models/qwen2",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.model.enable_gradient_checkpointing=True",
    "actor_rollout_ref.model.use_fused_kernels=True",
    "actor_rollout_ref.actor.strategy=megatron",
    "actor_rollout_ref.actor.ppo_mini_batch_size=64",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24000",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.001",
    "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
    "actor_rollout_ref.actor.grad_clip=0.5",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "actor_rollout_ref.actor.megatron.param_offload=False",
    "actor_rollout_ref.actor.megatron.optimizer_offload=True",
    "actor_rollout_ref.actor.megatron.grad_offload=True",
    "actor_rollout_ref.actor.megatron.context_parallel_size=1",
    "actor_rollout_ref.actor.megatron.use_mbridge=True",
    "+actor_rollout_ref.actor.megatron.override_transformer_config.attention_softmax_in_fp32=True",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.megatron.use_dist_checkpointing=False",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.mode=async",
    "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.rollout.load_format=dummy_megatron",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "actor_rollout_ref.rollout.prompt_length=512",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.agent.num_workers=8",
    "actor_rollout_ref.rollout.multi_turn.enable=False",
    "reward_model.enable=False",
    "reward_model.reward_manager=naive",
    "reward.custom_reward_function.path=reward.py",
    "reward.custom_reward_function.name=score",
    "+ray_kwargs.ray_init.num_cpus=16",
    "+trainer.val_before_train=False",
    "trainer.default_hdfs_dir=null",
    "trainer.logger=console",
    "trainer.n_gpus_per_node=8",
    "trainer.total_training_steps=100",
]


def run(*argv):
    config, _ = load(PPOConfig, [*argv], "ppo")
    check(config)
    return resolve(config, NODE)


def one(key, value, **further):
    """build() with one key of verl's beside a few known ones; dotted keys."""
    nested: dict = {}
    for name, item in {key: value, **further}.items():
        into = nested
        *groups, last = name.split(".")
        for part in groups:
            into = into.setdefault(part, {})
        into[last] = item
    return build(PPOConfig, nested)


def test_ppo_script():
    resolved = run(*PPO_SCRIPT)
    config = resolved.config
    assert (resolved.actor.tp, resolved.actor.pp, resolved.actor.dp, resolved.critic.pp) == (2, 2, 2, 2)
    assert config.actor_rollout_ref.actor.use_dynamic_bsz is False
    assert config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == 4
    # four samples of at most 1024 + 512 tokens
    assert config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu == 4 * 1536
    assert config.critic.ppo_max_token_len_per_gpu == 4 * 1536
    assert config.critic.megatron.override_transformer_config == {}
    assert (resolved.rollout.replicas, resolved.rollout.tp, resolved.ref) == (2, 4, None)
    assert len(config.data.train_files) == 2 and config.trainer.logger == ["console", "tensorboard"]


def test_grpo_script():
    resolved = run(*GRPO_SCRIPT)
    config = resolved.config
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert resolved.critic is None and resolved.ref.ranks == 8
    assert actor.optim.clip_grad == 0.5 and actor.ppo_max_token_len_per_gpu == 24000
    assert actor.megatron.override_transformer_config == {
        "attention_softmax_in_fp32": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    assert config.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu == 8 * 1536
    assert rollout.load_format == "dummy" and (rollout.n, resolved.batch.samples) == (8, 1024)
    assert (config.custom_reward_function.path, config.custom_reward_function.name) == ("reward.py", "score")
    assert config.ray_kwargs.ray_init.num_cpus == 16 and config.trainer.val_before_train is False
    assert config.trainer.logger == ["console"] and config.trainer.total_training_steps == 100


def test_sft_script():
    argv = [
        "data.train_files=/d/train.parquet", "data.micro_batch_size_per_gpu=4", "data.max_length=512",
        "model.partial_pretrain=/m", "optim.lr=1e-4", "engine=megatron", "model.enable_gradient_checkpointing=True",
        "trainer.default_hdfs_dir=null", "trainer.logger=console", "optim.lr_scheduler=cosine",
    ]  # fmt: skip
    config, _ = load(SFTConfig, argv, "sft")
    check(config)
    assert config.model.path == "/m" and config.data.max_token_len_per_gpu == 2048
    assert config.optim.lr_decay_style == "cosine"
    assert config.megatron.override_transformer_config["recompute_granularity"] == "full"
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node"):
        load(SFTConfig, [*argv, "trainer.n_gpus_per_node=8"], "sft")


@pytest.mark.parametrize(
    "key, value, mend",
    [
        ("model_engine", "dp", "model_engine=megatron"),
        (f"{ACTOR}.strategy", "fsdp", "Megatron-core is the only training engine"),
        (f"{ACTOR}.fsdp_config.param_offload", True, "megatron.* keys"),
        (f"{ACTOR}.megatron.param_offload", True, "optimizer_offload"),
        (f"{ACTOR}.megatron.context_parallel_size", 2, "context parallelism is not in hybridrl yet"),
        (f"{ACTOR}.megatron.override_ddp_config.overlap_grad_reduce", True, "DDP"),
        (f"{ACTOR}.ppo_micro_batch_size", 64, "ppo_micro_batch_size_per_gpu"),
        (f"{ACTOR}.policy_loss.rollout_correction.rollout_is", "token", "algorithm.rollout_correction"),
        (f"{ACTOR}.optim.min_lr_ratio", 0.1, f"see {ACTOR}.optim in --help"),
        ("critic.optim.optimizer", "muon", "AdamW"),
        ("actor_rollout_ref.model.use_remove_padding", False, "without padding"),
        ("actor_rollout_ref.model.lora_rank", 8, "LoRA"),
        ("actor_rollout_ref.model.lora.rank", 8, "LoRA"),
        (f"{ROLLOUT}.prompt_length", 7, "set data.max_prompt_length (now 512)"),
        (f"{ROLLOUT}.multi_turn.enable", True, "multi-turn"),
        (f"{ROLLOUT}.nnodes", 1, "trainer.placement.rollout"),
        (f"{ROLLOUT}.engine_kwargs.sglang.x", 1, "engine_kwargs.vllm"),
        (f"{ROLLOUT}.data_parallel_size", 2, "num_replicas"),
        ("reward_model.enable", True, "custom_reward_function.path"),
        ("reward.reward_manager.name", "prime", "custom_reward_function.path"),
        ("algorithm.filter_groups.max_inflight_gen_batches", 4, "one after the other"),
        ("reward.reward_kwargs.max_resp_len", 7, "data.max_response_length"),
        ("trainer.default_hdfs_dir", "hdfs://x", "trainer.default_local_dir"),
        ("trainer.v1.trainer_mode", "separate_async", "asynchronous training"),
        ("data.custom_cls.path", "x.py", "Parquet"),
    ],
)
def test_refused_with_the_mend(key, value, mend):
    with pytest.raises(ConfigError) as caught:
        one(key, value)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key}={value}: ") and mend in problem


def test_two_ways_to_say_one_thing_contradict():
    with pytest.raises(ConfigError, match="critic.ppo_max_token_len_per_gpu says the same in tokens"):
        one("critic.ppo_micro_batch_size_per_gpu", 4, **{"critic.ppo_max_token_len_per_gpu": 9999})
    both = {"custom_reward_function.path": "b.py"}
    with pytest.raises(ConfigError, match="contradicts custom_reward_function.path=b.py"):
        one("reward.custom_reward_function.path", "a.py", **both)
    assert one("reward.custom_reward_function.path", "b.py", **both).custom_reward_function.path == "b.py"


def test_bad_value_of_a_translated_key_is_a_message():
    with pytest.raises(ConfigError, match="critic.ppo_micro_batch_size_per_gpu=many"):
        one("critic.ppo_micro_batch_size_per_gpu", "many")
    with pytest.raises(ConfigError, match="lr_decay_style"):
        one(f"{ACTOR}.optim.warmup_style", "wsd")


def test_own_recompute_fields_win():
    target = f"{ACTOR}.megatron.override_transformer_config"
    own = {"recompute_granularity": "selective"}
    config = one("actor_rollout_ref.model.enable_gradient_checkpointing", True, **{target: own})
    assert get(config, target) == own


def test_translated_keys_count_as_set():
    config = one(f"{REF}.log_prob_micro_batch_size_per_gpu", 2)
    assert f"{REF}.log_prob_max_token_len_per_gpu" in config.explicit
    assert one(f"{ROLLOUT}.mode", "async").explicit == frozenset()


def test_cuda_graph_sizes_reach_vllm():
    config = one(f"{ROLLOUT}.cudagraph_capture_sizes", [1, 2], **{f"{ROLLOUT}.engine_kwargs.vllm": {"block_size": 16}})
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm == {"block_size": 16, "cudagraph_capture_sizes": [1, 2]}


def test_null_where_verl_allows_it():
    config = one(f"{ACTOR}.optim.lr_warmup_steps", None, **{f"{ROLLOUT}.dtype": "auto", "data.val_files": None})
    assert config.actor_rollout_ref.actor.optim.lr_warmup_steps == -1
    assert config.actor_rollout_ref.rollout.dtype is None and config.data.val_files == []


@pytest.mark.parametrize("table, cls", [(PPO, PPOConfig), (SFT, SFTConfig)])
def test_tables_are_consistent(table, cls):
    keys = leaves(cls)
    for pattern, rule in table.items():
        assert isinstance(rule, (Honoured, Moved, Derived, Refused))
        if isinstance(rule, Moved):
            assert rule.to.split(":")[0] in keys, f"{pattern}: moved to {rule.to}, which is no key"
        if isinstance(rule, Honoured) and compat_verl.ANY not in rule.values:
            assert rule.mend, f"{pattern}: a value that does not agree needs a mend"
        assert pattern not in keys, f"{pattern} is a key of hybridrl's: its rule is never asked"
    # an entry behind a wider one would never be reached
    seen: list[str] = []
    for pattern in table:
        if "*" not in pattern:
            wider = [before for before in seen if fnmatchcase(pattern, before)]
            assert not wider, f"{pattern} stands behind {wider}"
        seen.append(pattern)
