"""The rules between keys: every contradiction and impossible value is one error that names the keys and the mend."""

import pytest
from omegaconf import OmegaConf

from hybridrl.config import ConfigError, PPOConfig
from hybridrl.configuration import Machine, build, check, resolve

CPU, NODE = Machine("cpu", 0, 2, 24.0), Machine("cuda", 8, 64, 512.0)
BASE = ["data.train_files=train.parquet", "actor_rollout_ref.model.path=/model", "trainer.n_gpus_per_node=2"]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GRPO = ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=4"]
GDPO = ["algorithm.adv_estimator=gdpo", "algorithm.gdpo_reward_keys=[acc]", f"{ROLLOUT}.n=4"]
LOSS, CORRECTION = f"{ACTOR}.policy_loss.loss_mode", "algorithm.rollout_correction"
BUFFER = "reward.reward_kwargs.overlong_buffer_cfg"


def resolved(*words, machine=CPU):
    """A configuration without Hydra, whose tenth of a second is worth saving a hundred times."""
    flat = OmegaConf.from_dotlist([word.lstrip("+") for word in (*BASE, *words)])
    config = build(PPOConfig, OmegaConf.to_container(flat))
    check(config)
    return resolve(config, machine)


def problems(*words, machine=CPU):
    with pytest.raises(ConfigError) as caught:
        resolved(*words, machine=machine)
    return caught.value.problems


RULES = [
    (["data.train_files=[]"], ["data.train_files"]),
    ([*GRPO, "algorithm.lam=0.9"], ["algorithm.lam=0.9", "algorithm.adv_estimator=grpo"]),
    (["algorithm.norm_adv_by_std_in_grpo=false"], ["norm_adv_by_std_in_grpo=False", "adv_estimator=gae"]),
    ([*GRPO, "algorithm.gdpo_reward_keys=[a]"], ["gdpo_reward_keys", "adv_estimator=grpo"]),
    (["algorithm.adv_estimator=opo"], ["algorithm.adv_estimator=opo", f"{ROLLOUT}.n=1"]),
    ([*GDPO, "algorithm.gdpo_reward_keys=[]"], ["needs algorithm.gdpo_reward_keys"]),
    ([*GDPO, "algorithm.gdpo_reward_weights=[1,2]"], ["gdpo_reward_weights=[1.0, 2.0]", "one weight for each"]),
    ([*GDPO, "algorithm.use_kl_in_reward=true"], ["algorithm.use_kl_in_reward", "adv_estimator=gdpo"]),
    ([*GDPO, f"{BUFFER}.enable=true"], [f"{BUFFER}.enable", "adv_estimator=gdpo"]),
    (["algorithm.adv_estimator=no.such:thing"], ["algorithm.adv_estimator=no.such:thing", "does not import"]),
    (["algorithm.adv_estimator=math:nothing"], ["algorithm.adv_estimator=math:nothing", "no function 'nothing'"]),
    ([f"{LOSS}=no.such:thing"], [f"{LOSS}=no.such:thing", "does not import"]),
    ([f"{LOSS}=gspo", f"{ACTOR}.clip_ratio_c=10"], ["clip_ratio_c=10", f"{LOSS}=gspo"]),
    ([f"{LOSS}=gpg", f"{ACTOR}.clip_ratio=0.3"], ["clip_ratio=0.3", f"{LOSS}=gpg"]),
    ([f"{ACTOR}.tau_pos=2"], ["tau_pos=2", f"{LOSS}=vanilla"]),
    ([f"{ACTOR}.policy_loss.kl_cov_ratio=0.1"], ["kl_cov_ratio=0.1", f"{LOSS}=vanilla"]),
    ([f"{LOSS}=gspo", f"{ACTOR}.loss_agg_mode=token-sum"], ["loss_agg_mode=token-sum", "seq-mean-token-mean"]),
    ([f"{LOSS}=clip_cov", f"{ACTOR}.policy_loss.clip_cov_lb=7"], ["clip_cov_lb=7", "clip_cov_ub=5"]),
    ([f"{LOSS}=bypass_mode"], ["rollout_correction.bypass_mode=true"]),
    ([f"{LOSS}=reinforce"], [f"{LOSS}=reinforce", "loss_type", "gpg"]),
    ([f"{LOSS}=gspo", f"{CORRECTION}.bypass_mode=true"], [f"{LOSS}=gspo", "bypass_mode=true"]),
    (
        [f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.loss_type=reinforce", f"{ACTOR}.clip_ratio_high=0.3"],
        ["clip_ratio_high=0.3", "loss_type=reinforce"],
    ),
    ([f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.rollout_is=token"], ["rollout_is=token", "loss_type=ppo_clip"]),
    (
        [
            f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.loss_type=reinforce", f"{CORRECTION}.rollout_is=token",
            f"{CORRECTION}.rollout_is_batch_normalize=true",
        ],
        ["rollout_is_batch_normalize=true"],
    ),  # fmt: skip
    (
        [f"{CORRECTION}.bypass_mode=true", f"{ROLLOUT}.n=2", "algorithm.adv_estimator=optimal_token_baseline"],
        ["bypass_mode=true", "sum_pi_squared"],
    ),
    ([f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=0.5_5"], ["threshold=0.55", "quoted"]),
    ([f"{CORRECTION}.rollout_rs=token_k1"], ["rollout_rs=token_k1", "rollout_rs_threshold"]),
    ([f"{CORRECTION}.rollout_rs=token", f"{CORRECTION}.rollout_rs_threshold=1"], ["rollout_rs=token", "token_k1"]),
    (["algorithm.filter_groups.enable=true"], ["filter_groups.enable=true", f"{ROLLOUT}.n=1"]),
    (
        [*GRPO, "algorithm.filter_groups.enable=true", "algorithm.use_kl_in_reward=true"],
        ["metric=seq_final_reward", "use_kl_in_reward"],
    ),
    ([f"{BUFFER}.enable=true", f"{BUFFER}.len=600"], [f"{BUFFER}.len=600", "data.max_response_length=512"]),
    (["actor_rollout_ref.model.path=''"], ["actor_rollout_ref.model.path"]),
    (["data.train_batch_size=0"], ["data.train_batch_size=0", "positive"]),
    (["data.train_max_samples=-2"], ["data.train_max_samples=-2", "-1"]),
    (["trainer.test_freq=0"], ["trainer.test_freq=0"]),
    (["trainer.test_freq=5"], ["trainer.test_freq=5", "data.val_files"]),
    (["trainer.val_only=true"], ["trainer.val_only", "data.val_files"]),
    ([f"{ROLLOUT}.temperature=0"], [f"{ROLLOUT}.temperature=0"]),
    ([f"{ROLLOUT}.top_p=0"], [f"{ROLLOUT}.top_p=0"]),
    ([f"{ROLLOUT}.top_k=0"], [f"{ROLLOUT}.top_k=0"]),
    ([f"{ROLLOUT}.gpu_memory_utilization=90"], ["gpu_memory_utilization=90", "at most 1"]),
    (["algorithm.gamma=1.1"], ["algorithm.gamma=1.1"]),
    ([f"{ACTOR}.clip_ratio_c=1"], ["clip_ratio_c=1", "above 1"]),
    ([f"{ACTOR}.clip_ratio_low=1.5"], ["clip_ratio_low=1.5"]),
    (
        [f"{ACTOR}.ppo_mini_batch_size=100"],
        [f"{ACTOR}.ppo_mini_batch_size=100", "data.train_batch_size=1024", "64 would do"],
    ),
    ([f"{ACTOR}.ppo_mini_batch_size=2048"], [f"{ACTOR}.ppo_mini_batch_size=2048", "data.train_batch_size"]),
    (["critic.ppo_mini_batch_size=100"], ["critic.ppo_mini_batch_size=100", "data.train_batch_size=1024"]),
    (["data.train_batch_size=300"], [f"{ACTOR}.ppo_mini_batch_size=256", "data.train_batch_size=300"]),
    (["data.train_batch_size=1"], ["1 samples a mini-batch", "2 data-parallel ranks"]),
    (
        [f"{ACTOR}.use_dynamic_bsz=true", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"],
        ["use_dynamic_bsz=true", "ppo_micro_batch_size_per_gpu=4"],
    ),
    ([f"{ACTOR}.use_dynamic_bsz=false"], ["use_dynamic_bsz=false needs", "ppo_micro_batch_size_per_gpu"]),
    ([f"{ACTOR}.ppo_max_token_len_per_gpu=1000"], ["ppo_max_token_len_per_gpu=1000", "= 1024"]),
    (["critic.ppo_max_token_len_per_gpu=1000"], ["critic.ppo_max_token_len_per_gpu=1000"]),
    ([f"{ROLLOUT}.log_prob_max_token_len_per_gpu=9"], ["rollout.log_prob_max_token_len_per_gpu=9"]),
    ([f"{ROLLOUT}.max_model_len=1000"], ["max_model_len=1000", "data.max_prompt_length"]),
    ([f"{ROLLOUT}.max_num_batched_tokens=100"], ["max_num_batched_tokens=100", "max_num_seqs=256"]),
    (
        [f"{ROLLOUT}.max_num_batched_tokens=512", f"{ROLLOUT}.enable_chunked_prefill=false"],
        ["enable_chunked_prefill=true"],
    ),
    (["algorithm.adv_estimator=grp"], ["algorithm.adv_estimator=grp", "grpo"]),
    ([f"{ACTOR}.policy_loss.loss_mode=vanila"], ["policy_loss.loss_mode=vanila", "vanilla"]),
    (["algorithm.adv_estimator=grpo"], ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=1"]),
    (["algorithm.adv_estimator=rloo"], ["algorithm.adv_estimator=rloo", f"{ROLLOUT}.n=1"]),
    (["critic.enable=false"], ["critic.enable=false", "algorithm.adv_estimator=gae"]),
    ([*GRPO, "critic.enable=true"], ["critic.enable=true", "algorithm.adv_estimator=grpo"]),
    ([*GRPO, "trainer.critic_warmup=3"], ["trainer.critic_warmup=3"]),
    ([f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0"], ["use_kl_loss=true", "kl_loss_coef=0"]),
    (["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0"], ["use_kl_in_reward=true", "kl_coef=0"]),
    ([f"{ACTOR}.loss_scale_factor=10"], ["loss_scale_factor=10", "seq-mean-token-sum-norm"]),
    ([f"{ACTOR}.checkpoint.save_contents=[optimiser]"], ["save_contents", "optimiser", "hf_model"]),
    ([f"{ACTOR}.checkpoint.save_contents=[extra]", "trainer.save_freq=1"], ["save_contents", "lacks model, optimizer"]),
    ([f"{ACTOR}.optim.betas=[0.9]"], ["optim.betas", "two numbers"]),
    (
        [f"{ACTOR}.optim.lr_warmup_steps=3", f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1"],
        ["lr_warmup_steps and lr_warmup_steps_ratio"],
    ),
    (["critic.optim.min_lr=1e-7"], ["critic.optim.min_lr=1e-07", "lr_decay_style=constant"]),
    (["critic.optim.min_lr=1", "critic.optim.lr_decay_style=cosine"], ["critic.optim.min_lr=1", "critic.optim.lr"]),
    ([f"{ROLLOUT}.val_kwargs.do_sample=true"], ["val_kwargs.do_sample=true", "val_kwargs.temperature=0"]),
    ([f"{ROLLOUT}.val_kwargs.temperature=0.6"], ["val_kwargs.temperature=0.6", "val_kwargs.do_sample=false"]),
    ([f"{ROLLOUT}.val_kwargs.n=4"], ["val_kwargs.n=4", "val_kwargs.do_sample=false"]),
    ([f"+{ROLLOUT}.engine_kwargs.vllm.dtype=half"], ["engine_kwargs.vllm.dtype", f"set {ROLLOUT}.dtype"]),
    ([f"+{ACTOR}.megatron.override_transformer_config.num_layers=2"], ["override_transformer_config.num_layers"]),
    (
        [f"{ACTOR}.megatron.tensor_model_parallel_size=4"],
        ["actor.megatron.tensor_model_parallel_size=4", "does not divide the 2 ranks"],
    ),
    (
        [f"{ACTOR}.megatron.virtual_pipeline_model_parallel_size=2"],
        ["actor.megatron.virtual_pipeline_model_parallel_size=2", "pipeline_model_parallel_size above 1"],
    ),
    ([f"{ACTOR}.megatron.pipeline_model_parallel_size=3"], ["pipeline_model_parallel_size=3", "does not divide"]),
    (
        ["critic.megatron.tensor_model_parallel_size=2"],
        [
            "critic.megatron.tensor_model_parallel_size=2",
            f"{ACTOR}.megatron.tensor_model_parallel_size=1",
            "trainer.placement.critic",
        ],
    ),
    (["critic.megatron.seed=7"], ["critic.megatron.seed=7", f"{ACTOR}.megatron.seed=42", "trainer.placement.critic"]),
    (
        ["trainer.executor=local", "trainer.n_gpus_per_node=1", f"{ROLLOUT}.num_replicas=2"],
        ["trainer.executor=local", "num_replicas=2"],
    ),
    ([f"{ROLLOUT}.max_num_batched_tokens=512"], ["max_num_batched_tokens=512", "1024 tokens", "CPU"]),
    (["critic.megatron.dtype=float32"], ["critic.megatron.dtype=float32", "trainer.placement.critic"]),
    (
        [f"{ACTOR}.use_kl_loss=true", "actor_rollout_ref.ref.megatron.pipeline_model_parallel_size=2"],
        ["trainer.placement.ref"],
    ),
    ([*GRPO, "trainer.placement.critic=1"], ["trainer.placement.critic=1", "no critic"]),
    (["trainer.placement.ref=1"], ["trainer.placement.ref=1", "no reference"]),
    (
        ["trainer.placement.critic=3", "critic.megatron.tensor_model_parallel_size=2"],
        ["3 ranks of trainer.placement.critic"],
    ),
    (["trainer.logger=[console,swanlab]"], ["trainer.logger", "swanlab", "tensorboard"]),
    (["trainer.executor=local"], ["trainer.executor=local", "trainer.n_gpus_per_node=2"]),
    (
        ["trainer.executor=local", "trainer.n_gpus_per_node=1", "trainer.placement.critic=1"],
        ["trainer.placement.critic", "local"],
    ),
    (["trainer.resume_mode=resume_path"], ["trainer.resume_from_path"]),
    (["trainer.resume_from_path=/x"], ["trainer.resume_mode=resume_path"]),
    (["custom_reward_function.name=f"], ["custom_reward_function.path"]),
    (["trainer.n_gpus_per_node=9"], ["trainer.n_gpus_per_node=9", "trainer.cpu_ranks_max=8"]),
    ([f"{ROLLOUT}.tensor_model_parallel_size=2"], [f"{ROLLOUT}.tensor_model_parallel_size=2", "CPU"]),
    (["trainer.placement.rollout=1", f"{ROLLOUT}.num_replicas=2"], ["trainer.placement.rollout=1", "num_replicas=2"]),
]


@pytest.mark.parametrize("argv, words", RULES, ids=[" ".join(argv) for argv, _ in RULES])
def test_rules(argv, words):
    found = problems(*argv)
    assert len(found) == 1 and all(word in found[0] for word in words), found


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trainer.n_gpus_per_node=16"], ["asks for 16 GPUs", "has 8"]),
        (["trainer.n_gpus_per_node=6", "trainer.placement.rollout=4"], ["asks for 10 GPUs", "trainer.placement"]),
        ([f"{ROLLOUT}.tensor_model_parallel_size=4"], ["the pool has 2 GPUs"]),
        (
            ["trainer.n_gpus_per_node=8", f"{ROLLOUT}.tensor_model_parallel_size=4", f"{ROLLOUT}.num_replicas=3"],
            ["num_replicas=3", "8 GPUs"],
        ),
    ],
)
def test_rules_of_a_gpu_machine(argv, words):
    (found,) = problems(*argv, machine=NODE)
    assert all(word in found for word in words)


def test_a_cluster_is_not_held_against_this_machine():
    assert resolved("trainer.nnodes=2", "trainer.n_gpus_per_node=16", machine=NODE).actor.ranks == 32
