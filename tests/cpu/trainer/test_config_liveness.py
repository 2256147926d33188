"""Every key is live: changing it changes what the parts of the system are told, what is written, or is refused.

Reading a key proves nothing; see liveness.py for where the difference has to show. Whether the parts then do what they
are told is their own tests' matter.
"""

from dataclasses import replace
from typing import Literal, get_args, get_origin

import liveness
import pytest

from hybridrl.config import PPOConfig, SFTConfig, inner_type, leaves
from hybridrl.configuration import Machine
from hybridrl.rules import get

CPU, GPU = Machine("cpu", 0, 2, 16.0), Machine("cuda", 8, 16, 64.0)
ARR, ACTOR, ROLLOUT = "actor_rollout_ref", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REF = "actor_rollout_ref.ref"

KL_LOSS = {f"{ACTOR}.use_kl_loss": True}
KL_REWARD = {"algorithm.use_kl_in_reward": True}
ADAPTIVE = KL_REWARD | {"algorithm.kl_ctrl.type": "adaptive"}
GRPO = {"algorithm.adv_estimator": "grpo"}
SAMPLED = {f"{ROLLOUT}.val_kwargs.do_sample": True, f"{ROLLOUT}.val_kwargs.temperature": 0.7}
SAVING = {"trainer.save_freq": 1}
TP2 = {f"{ACTOR}.megatron.tensor_model_parallel_size": 2}
OWN_CRITIC = {"trainer.placement.critic": 2}
OWN_REF = KL_LOSS | {"trainer.placement.ref": 2}
ON_GPU = {"machine": GPU}
NORM = {f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm"}
LOSS, CORRECTION = f"{ACTOR}.policy_loss", "algorithm.rollout_correction"
SAPO = {f"{LOSS}.loss_mode": "sapo"}
CLIP_COV = {
    f"{LOSS}.loss_mode": "clip_cov",
    f"{LOSS}.clip_cov_lb": -9.0,
    f"{LOSS}.clip_cov_ub": 9.0,
    f"{LOSS}.clip_cov_ratio": 1.0,
}
KL_COV = {f"{LOSS}.loss_mode": "kl_cov"}
GDPO = {"algorithm.adv_estimator": "gdpo", "algorithm.gdpo_reward_keys": ["acc", "score"]}
FILTER = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "acc"}
WEIGHTS = {f"{CORRECTION}.rollout_is": "token"}
REJECTION = {f"{CORRECTION}.rollout_rs": "token_k1", f"{CORRECTION}.rollout_rs_threshold": "1.05"}
BYPASS = {f"{CORRECTION}.bypass_mode": True}
BUFFER = "reward.reward_kwargs.overlong_buffer_cfg"
OVERLONG = {f"{BUFFER}.enable": True, f"{BUFFER}.len": 7}

# Leaf -> another value, or (another value, what else must be set for the key to matter). Leaves that are not here get
# a value by their type and the plain run.
PPO_CASES = {
    "data.train_files": "{place}/train2.parquet",
    "data.val_files": "{place}/val2.parquet",
    "data.train_batch_size": 6,
    "data.max_prompt_length": (5, {"data.truncation": "left"}),
    "data.truncation": ("right", {"data.max_prompt_length": 5, "data.truncation": "left"}),
    "data.filter_overlong_prompts": (
        True,
        {"data.max_prompt_length": 20, "data.truncation": "left", "data.train_batch_size": 2},
    ),
    "data.prompt_key": "question",
    "data.reward_fn_key": "source",
    "data.seed": 7,
    "data.train_max_samples": 8,
    "data.val_max_samples": 2,
    "data.apply_chat_template_kwargs": {"add_generation_prompt": False},
    f"{ARR}.model.path": "{place}/model2",
    f"{ARR}.model.tokenizer_path": (
        "{place}/model2",
        {f"{ACTOR}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"], **SAVING},
    ),
    f"{ACTOR}.ppo_mini_batch_size": 2,
    f"{ACTOR}.ppo_epochs": 2,
    f"{ACTOR}.data_loader_seed": (7, {f"{ACTOR}.shuffle": True, f"{ACTOR}.ppo_mini_batch_size": 2}),
    f"{ACTOR}.shuffle": (True, {f"{ACTOR}.ppo_mini_batch_size": 2}),
    f"{ACTOR}.use_dynamic_bsz": False,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": 1,
    f"{ACTOR}.ppo_max_token_len_per_gpu": 200,
    f"{ACTOR}.clip_ratio_low": 0.1,
    f"{ACTOR}.clip_ratio_high": 0.3,
    f"{ACTOR}.loss_agg_mode": "token-sum",
    f"{ACTOR}.loss_scale_factor": (7.0, NORM),
    f"{ACTOR}.kl_loss_coef": (0.5, KL_LOSS),
    f"{ACTOR}.kl_loss_type": ("abs", KL_LOSS),
    f"{ACTOR}.policy_loss.loss_mode": "none-such",
    f"{ACTOR}.checkpoint.save_contents": (["model", "optimizer", "extra", "hf_model"], SAVING),
    f"{REF}.log_prob_max_token_len_per_gpu": (200, KL_LOSS),
    f"{ROLLOUT}.n": 3,
    f"{ROLLOUT}.top_k": 5,
    f"{ROLLOUT}.top_p": 0.5,
    f"{ROLLOUT}.tensor_model_parallel_size": (2, ON_GPU),
    f"{ROLLOUT}.num_replicas": 2,
    f"{ROLLOUT}.dtype": "float32",
    f"{ROLLOUT}.gpu_memory_utilization": (0.9, ON_GPU),
    f"{ROLLOUT}.max_model_len": 500,
    f"{ROLLOUT}.max_num_seqs": 5,
    f"{ROLLOUT}.max_num_batched_tokens": 4000,
    f"{ROLLOUT}.enforce_eager": False,
    f"{ROLLOUT}.load_format": "auto",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 200,
    f"{ROLLOUT}.val_kwargs.n": (2, SAMPLED),
    f"{ROLLOUT}.val_kwargs.do_sample": (True, {f"{ROLLOUT}.val_kwargs.n": 1}),
    f"{ROLLOUT}.val_kwargs.temperature": (0.3, SAMPLED),
    f"{ROLLOUT}.val_kwargs.top_p": (0.3, SAMPLED),
    f"{ROLLOUT}.val_kwargs.top_k": (3, SAMPLED),
    f"{ROLLOUT}.engine_kwargs.vllm": {"block_size": 16},
    "critic.enable": False,
    "critic.ppo_mini_batch_size": 2,
    "critic.ppo_epochs": 2,
    "critic.ppo_max_token_len_per_gpu": 200,
    "critic.loss_agg_mode": "token-sum",
    "critic.model.path": "{place}/model2",
    "algorithm.adv_estimator": "grpo",
    "algorithm.gamma": 0.5,
    "algorithm.lam": 0.5,
    "algorithm.norm_adv_by_std_in_grpo": (False, GRPO),
    "algorithm.kl_penalty": ("k2", KL_REWARD),
    "algorithm.kl_ctrl.type": ("adaptive", KL_REWARD),
    "algorithm.kl_ctrl.kl_coef": (0.5, KL_REWARD),
    "algorithm.kl_ctrl.horizon": (10, ADAPTIVE),
    "algorithm.kl_ctrl.target_kl": (0.499, ADAPTIVE | {"algorithm.kl_ctrl.target_kl": 0.41}),
    f"{ACTOR}.tau_pos": (3.0, SAPO),
    f"{ACTOR}.tau_neg": (3.0, SAPO),
    f"{LOSS}.clip_cov_ratio": (0.1, CLIP_COV),
    f"{LOSS}.clip_cov_lb": (0.0, CLIP_COV),
    f"{LOSS}.clip_cov_ub": (0.05, CLIP_COV),
    f"{LOSS}.kl_cov_ratio": (0.5, KL_COV),
    f"{LOSS}.ppo_kl_coef": (0.5, KL_COV),
    f"{LOSS}.dro_beta": (0.5, {f"{LOSS}.loss_mode": "dro"}),
    "algorithm.gdpo_reward_keys": (["score", "acc"], GDPO | {"algorithm.gdpo_reward_weights": [1.0, 2.0]}),
    "algorithm.gdpo_reward_weights": ([1.0, 3.0], GDPO),
    "algorithm.filter_groups.metric": ("acc", {"algorithm.filter_groups.enable": True}),
    "algorithm.filter_groups.max_num_gen_batches": (1, FILTER),
    "algorithm.filter_groups.enable": (True, FILTER | {"algorithm.filter_groups.enable": False}),
    f"{CORRECTION}.rollout_is": "token",
    f"{CORRECTION}.rollout_is_threshold": ("1.01", WEIGHTS),
    f"{CORRECTION}.rollout_is_batch_normalize": (True, WEIGHTS),
    f"{CORRECTION}.rollout_rs": (None, REJECTION),
    f"{CORRECTION}.rollout_rs_threshold": ("1.2", REJECTION),
    f"{CORRECTION}.loss_type": ("reinforce", BYPASS),
    f"{BUFFER}.enable": (True, {f"{BUFFER}.len": 7}),
    f"{BUFFER}.len": (6, OVERLONG),
    f"{BUFFER}.penalty_factor": (2.0, OVERLONG),
    "custom_reward_function.path": "{place}/reward.py",
    "custom_reward_function.name": ("g", {"custom_reward_function.path": "{place}/reward.py"}),
    "reward.num_workers": 1,
    "trainer.default_local_dir": "{place}/run/below",
    "trainer.logger": ["tensorboard"],
    "trainer.device": ("cuda", {"machine": None}),
    "trainer.executor": "local",
    "trainer.n_gpus_per_node": 4,
    "trainer.cpu_ranks_max": 1,
    "trainer.placement.critic": 1,
    "trainer.placement.ref": (1, KL_LOSS),
    "trainer.placement.rollout": (1, ON_GPU),
    "trainer.total_epochs": (2, {"trainer.total_training_steps": None, "trainer.total_epochs": 1}),
    "trainer.val_before_train": False,
    "trainer.test_freq": 2,
    "trainer.save_freq": 1,
    "trainer.max_actor_ckpt_to_keep": (1, SAVING),
    "trainer.resume_mode": ("disable", {"trainer.default_local_dir": "{place}/resumable"}),
    "trainer.resume_from_path": (
        "{place}/resumable/global_step_2",
        {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": "{place}/resumable/global_step_1"},
    ),
    "trainer.log_val_generations": (2, {"trainer.logger": ["console"]}),
    "trainer.rollout_data_dir": "{place}/run/elsewhere",
    "ray_kwargs.ray_init.address": "10.0.0.1:6379",
    f"{ROLLOUT}.name": "sglang",
    f"{ROLLOUT}.free_cache_engine": (False, ON_GPU),
}
_SCHEDULE = {
    "optim.lr_warmup_steps": 1,
    "optim.lr_warmup_steps_ratio": 0.5,
    "optim.lr_decay_style": "cosine",
    "optim.betas": [0.8, 0.9],
}
for _role in (ACTOR, "critic"):
    PPO_CASES |= {f"{_role}.{key}": value for key, value in _SCHEDULE.items()}
    PPO_CASES[f"{_role}.optim.min_lr"] = (1e-9, {f"{_role}.optim.lr_decay_style": "cosine"})
    PPO_CASES[f"{_role}.megatron.grad_offload"] = PPO_CASES[f"{_role}.megatron.optimizer_offload"] = (True, ON_GPU)
for _role, _more in ((ACTOR, {}), ("critic", OWN_CRITIC), (REF, OWN_REF)):
    PPO_CASES |= {
        f"{_role}.megatron.tensor_model_parallel_size": (2, _more),
        f"{_role}.megatron.pipeline_model_parallel_size": (2, _more),
        f"{_role}.megatron.virtual_pipeline_model_parallel_size": (
            2, _more | {f"{_role}.megatron.pipeline_model_parallel_size": 2},
        ),
        f"{_role}.megatron.sequence_parallel": (False, _more | {f"{_role}.megatron.tensor_model_parallel_size": 2}),
        f"{_role}.megatron.dtype": ("float32", _more),
        f"{_role}.megatron.transformer_impl": ("transformer_engine", _more),
        f"{_role}.megatron.override_transformer_config": ({"layernorm_epsilon": 0.5}, _more),
    }
PPO_CASES["critic.megatron.seed"] = (7, OWN_CRITIC)

SFT_CASES = {
    "data.train_files": "{place}/pairs2.parquet",
    "data.val_files": "{place}/pairs2.parquet",
    "data.train_batch_size": 4,
    "data.max_length": (20, {"data.truncation": "right"}),
    "data.truncation": ("error", {"data.truncation": "right", "data.max_length": 20}),
    "data.prompt_key": "question",
    "data.response_key": "answer",
    "data.max_token_len_per_gpu": 120,
    "data.train_max_samples": 30,
    "model.path": "{place}/model2",
    "model.tokenizer_path": "{place}/model2",
    "trainer.default_local_dir": "{place}/run/below",
    "trainer.logger": ["tensorboard"],
    "trainer.device": ("cuda", {"machine": None}),
    "trainer.total_epochs": (2, {"trainer.total_training_steps": None, "data.train_max_samples": 16}),
    "trainer.test_freq": 1,
    "optim.min_lr": (1e-9, {"optim.lr_decay_style": "cosine"}),
    "megatron.tensor_model_parallel_size": 2,
    "megatron.pipeline_model_parallel_size": 2,
    "megatron.virtual_pipeline_model_parallel_size": (2, {"megatron.pipeline_model_parallel_size": 2}),
    "megatron.sequence_parallel": (False, {"megatron.tensor_model_parallel_size": 2}),
    "megatron.dtype": "float32",
    "megatron.transformer_impl": "transformer_engine",
    "megatron.override_transformer_config": {"layernorm_epsilon": 0.5},
    **_SCHEDULE,
}


def base_of(cls: type) -> dict:
    common = {"trainer.default_local_dir": "{place}/run", "trainer.device": "cpu", "trainer.total_training_steps": 2}
    if cls is SFTConfig:
        files = {
            "data.train_files": "{place}/pairs.parquet",
            "model.path": "{place}/model",
            "data.val_files": "{place}/pairs.parquet",
        }
        return common | files | {"data.train_batch_size": 8, "data.max_length": 100, "data.max_token_len_per_gpu": 400}
    return common | {
        "data.train_files": "{place}/train.parquet",
        "data.val_files": "{place}/val.parquet",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 64,
        "data.max_response_length": 8,
        f"{ARR}.model.path": "{place}/model",
        f"{ROLLOUT}.n": 2,
        f"{ACTOR}.ppo_max_token_len_per_gpu": 72,
        f"{ROLLOUT}.max_num_seqs": 4,
        "trainer.n_gpus_per_node": 2,
        "trainer.test_freq": 1,
        "trainer.logger": [],
    }


def other_value(cls: type, leaf: str, flat: dict):
    """A different value of the leaf's type."""
    kind, _ = inner_type(leaves(cls)[leaf])
    now = flat.get(leaf, get(cls(), leaf))
    if kind is bool:
        return not now
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != now)
    if kind is int:
        return (now or 0) + 1
    if kind is float:
        return (now or 0.0) * 0.5 + 0.01
    assert kind is str, f"{leaf}: give a value in the table of cases"
    return f"other-{now}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("liveness")
    liveness.write_inputs(folder)
    # a run with two checkpoints to go on from
    further = {"trainer.default_local_dir": "{place}/resumable", "trainer.save_freq": 1}
    flat = {
        k: v.replace("{place}", str(folder)) if isinstance(v, str) else v
        for k, v in (base_of(PPOConfig) | further).items()
    }
    liveness.run(PPOConfig, flat, folder, CPU)
    return folder


@pytest.fixture(scope="module")
def outcome(place):
    """run() with the outcomes of equal configurations kept."""
    kept: dict[str, str] = {}

    def fill(value):
        return value.replace("{place}", str(place)) if isinstance(value, str) else value

    def find(cls: type, flat: dict, machine) -> str:
        flat = {name: fill(value) for name, value in flat.items()}
        name = repr((cls, sorted(flat.items(), key=str), machine))
        if name not in kept:
            kept[name] = liveness.run(cls, flat, place, machine)
        return kept[name]

    return find


def assert_live(cls: type, leaf: str, case, outcome) -> None:
    value, context = case if isinstance(case, tuple) else (case, {})
    context = dict(context)
    machine = context.pop("machine", CPU)
    before = base_of(cls) | context
    if machine is not CPU:
        before["trainer.device"] = "cpu" if machine is None else "cuda"
    value = other_value(cls, leaf, before) if case is None else value
    first, second = outcome(cls, before, machine), outcome(cls, before | {leaf: value}, machine)
    assert not first.startswith("refused"), f"the run to compare with is no run: {first}"
    assert first != second, f"{leaf}={value} changes nothing"
    if second.startswith("refused"):
        assert leaf.rsplit(".", 1)[-1] in second, f"{leaf}={value} is refused without its name: {second}"


@pytest.mark.parametrize("leaf", leaves(PPOConfig))
def test_ppo_key_is_live(leaf, outcome):
    assert_live(PPOConfig, leaf, PPO_CASES.get(leaf), outcome)


@pytest.mark.parametrize("leaf", leaves(SFTConfig))
def test_sft_key_is_live(leaf, outcome):
    assert_live(SFTConfig, leaf, SFT_CASES.get(leaf), outcome)


def test_the_same_run_has_the_same_outcome(place):
    """Else every key would look live."""
    for cls in (PPOConfig, SFTConfig):
        flat = {k: v.replace("{place}", str(place)) if isinstance(v, str) else v for k, v in base_of(cls).items()}
        assert liveness.run(cls, flat, place, CPU) == liveness.run(cls, flat, place, replace(CPU))


def test_tables_name_keys():
    assert set(PPO_CASES) <= set(leaves(PPOConfig)) and set(SFT_CASES) <= set(leaves(SFTConfig))
