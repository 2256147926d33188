"""The configuration: composing, types, messages, what resolving fills in, the plan."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import hybridrl
from hybridrl import config as config_module
from hybridrl.config import ConfigError, PPOConfig, SFTConfig, leaves
from hybridrl.configuration import Machine, build, check, load, plan_rows, resolve, tree_of
from hybridrl.plan_table import unused_keys
from hybridrl.rules import get

ROOT = Path(__file__).resolve().parents[2]
CPU, NODE = Machine("cpu", 0, 2, 24.0), Machine("cuda", 8, 64, 512.0)
BASE = ["data.train_files=train.parquet", "actor_rollout_ref.model.path=/model", "trainer.n_gpus_per_node=2"]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GRPO = ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=4"]

SEED = [
    "data.train_files=data/train.parquet",
    "data.val_files=data/test.parquet",
    "data.train_batch_size=512",
    "data.max_prompt_length=1024",
    "data.max_response_length=512",
    "actor_rollout_ref.model.path=/model",
    "actor_rollout_ref.actor.optim.lr=1e-6",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.9",
    "critic.model.path=/critic",
    "critic.optim.lr=1e-5",
    "trainer.n_gpus_per_node=8",
    "trainer.nnodes=1",
    "trainer.project_name=verl_example",
    "trainer.experiment_name=qwen2_7b_gsm8k",
    "trainer.total_epochs=3",
    "trainer.logger=['console']",
]


def ppo(*argv, base=BASE):
    return load(PPOConfig, [*base, *argv], "ppo")[0]


def resolved(*argv, machine=CPU, base=BASE):
    config = ppo(*argv, base=base)
    check(config)
    return resolve(config, machine)


def problems(*argv, base=BASE):
    """What a command line is refused for, by whichever stage refuses it."""
    with pytest.raises(ConfigError) as caught:
        resolved(*argv, base=base)
    return caught.value.problems


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("further", [[], ["trainer.n_gpus_per_node=2"], ["trainer.cpu_ranks_max=8"]])
def test_seed_command(further):
    run = resolved(*further, base=SEED)
    config = run.config
    assert config.data.train_files == ["data/train.parquet"] and config.critic.model.path == "/critic"
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6 and config.critic.optim.lr == 1e-5
    assert config.actor_rollout_ref.rollout.gpu_memory_utilization == 0.9
    assert (run.batch.prompts, run.batch.mini_batches, run.critic.dp) == (512, 2, run.actor.ranks)
    assert config.trainer.default_local_dir == "checkpoints/verl_example/qwen2_7b_gsm8k"
    assert config.explicit == {word.split("=")[0] for word in SEED + further}


def test_defaults_are_the_dataclasses():
    assert load(PPOConfig, [], "ppo")[0] == PPOConfig() and load(SFTConfig, [], "sft")[0] == SFTConfig()
    assert load(PPOConfig, [], "ppo")[0].explicit == frozenset()


def test_grammar_of_overrides():
    config = ppo(
        f"+{ACTOR}.megatron.override_transformer_config.recompute_granularity=full",
        f"{ROLLOUT}.engine_kwargs.vllm={{block_size: 16}}",
        f"++{ROLLOUT}.n=4",
        "data.val_files=['a b.parquet', c.parquet]",
        "trainer.total_training_steps=1e2",
        f"{ACTOR}.clip_ratio=1",
        "trainer.experiment_name=7",
        "trainer.logger=[console,file]",
        "data.seed=null",
    )
    assert config.actor_rollout_ref.actor.megatron.override_transformer_config == {"recompute_granularity": "full"}
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm == {"block_size": 16}
    assert config.actor_rollout_ref.rollout.n == 4 and config.data.val_files == ["a b.parquet", "c.parquet"]
    assert type(config.trainer.total_training_steps) is int and type(config.actor_rollout_ref.actor.clip_ratio) is float
    assert config.trainer.experiment_name == "7" and config.trainer.logger == ["console", "file"]
    assert config.data.seed is None and "data.seed" in config.explicit


def test_own_folder_recipes_interpolation_and_deletion(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [recipes/gsm8k_grpo@_global_, _self_]\n"
        "data: {train_batch_size: 128, max_response_length: '${data.max_prompt_length}'}\n"
        "actor_rollout_ref: {actor: {optim: {lr: 2e-6}}}\n"
    )
    argv = [f"--config-dir={tmp_path}", "--config-name", "mine.yaml", f"~{ROLLOUT}.n", "trainer.save_freq=7"]
    config, tree = load(PPOConfig, argv, "ppo")
    assert config.algorithm.adv_estimator == "grpo" and config.data.train_batch_size == 128
    assert config.data.max_response_length == config.data.max_prompt_length == 512
    assert config.actor_rollout_ref.actor.optim.lr == 2e-6
    assert config.actor_rollout_ref.rollout.n == 1 and f"{ROLLOUT}.n" not in config.explicit
    assert {"data.max_response_length", "algorithm.adv_estimator", "trainer.save_freq"} <= config.explicit
    assert "algorithm.gamma" not in config.explicit
    assert build(PPOConfig, tree) == config == build(PPOConfig, yaml.safe_load(yaml.safe_dump(tree)))


@pytest.mark.parametrize("name", ["ppo_megatron_trainer", "ppo_megatron_trainer.yaml", "ppo_trainer"])
def test_verls_names_of_the_main_file(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # verl's scripts name a folder that only verl has
    assert load(PPOConfig, ["--config-path=./config", f"--config-name={name}", *BASE], "ppo")[0] == ppo()


def test_every_yaml_file_loads():
    for path in sorted(Path(hybridrl.config_dir()).rglob("*.yaml")):
        cls = SFTConfig if "sft" in path.stem else PPOConfig
        name = str(path.relative_to(hybridrl.config_dir()).with_suffix(""))
        argv = ["data.train_files=t", "data.val_files=v"]
        argv += ["model.path=/m"] if cls is SFTConfig else ["actor_rollout_ref.model.path=/m"]
        config, _ = load(cls, [f"--config-name={name}", *argv], "ppo")
        check(config)
        resolve(config, NODE if "gsm8k" in name else CPU, *([1] if cls is SFTConfig else []))
        assert len(path.read_text().splitlines()) <= 40, f"{path}: more than a screen"


def test_yaml_holds_only_what_differs():
    for path in sorted(Path(hybridrl.config_dir()).rglob("*.yaml")):
        cls = SFTConfig if "sft" in path.stem else PPOConfig
        own, default = build(cls, OmegaConf.to_container(OmegaConf.load(path))), cls()
        same = [key for key in own.explicit if get(own, key) == get(default, key)]
        # 512 or 0.001 may be said again where it belongs to what the recipe is about
        assert len(same) <= 5, f"{path}: repeats defaults: {same}"


def test_help_and_cfg(capsys):
    for argv, words in (
        (["--help"], ["ppo_mini_batch_size", "Prompts a step.", "bfloat16"]),
        (["--cfg", "job", "data.seed=5"], ["seed: 5"]),
    ):
        with pytest.raises(SystemExit) as left:
            load(PPOConfig, argv, "ppo")
        out = capsys.readouterr().out
        assert left.value.code == 0 and all(word in out for word in words)
    assert yaml.safe_load(out)["data"]["seed"] == 5


def test_help_lists_every_key(capsys):
    for cls, name in ((PPOConfig, "ppo"), (SFTConfig, "sft")):
        with pytest.raises(SystemExit):
            load(cls, ["--help"], name)
        out = capsys.readouterr().out
        assert [key for key in leaves(cls) if key not in out] == []


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ppo()
    assert list(tmp_path.iterdir()) == []


# -- messages of loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, says",
    [
        ("trainer.n_gpu_per_node=2", "trainer.n_gpu_per_node: unknown key; did you mean trainer.n_gpus_per_node"),
        ("actor.optim.lr=1", "actor.optim.lr: unknown key; did you mean actor_rollout_ref.actor.optim.lr"),
        ("critic=3", "critic=3: is a group of keys"),
        (f"{ACTOR}.optim.lr=fast", f"{ACTOR}.optim.lr='fast': must be float"),
        (f"{ACTOR}.optim.lr=inf", f"{ACTOR}.optim.lr=inf: must be float"),
        ("data.train_batch_size=1.5", "data.train_batch_size=1.5: must be int"),
        ("data.train_batch_size=true", "data.train_batch_size=True: must be int"),
        ("data.train_batch_size='8'", "without quotes"),
        ("data.shuffle=1", "data.shuffle=1: must be bool"),
        ("data.truncation=middel", "must be error or left or right or middle"),
        (f"{ACTOR}.megatron.dtype=float16", "must be bfloat16 or float32 or null"),
        ("data.seed=None", "nothing is written null"),
        ("data.train_files=[1.5]", "must be list of str"),
        ("data.train_files=null", "must be list of str"),
        (f"{ACTOR}.optim.betas=0.9", "must be list of float"),
        (f"{ROLLOUT}.engine_kwargs.vllm=3", "must be dict"),
        ("trainer.project_name=1.5", "quote it"),
        ("trainer.logger=console,file", "several values; a list is written trainer.logger=[console,file]"),
        ("trainer.logger", "not key=value"),
        ("data.val_files=[a", "not key=value"),
        ("hydra.run.dir=/x", "trainer.default_local_dir names the run folder"),
        ("~trainer.nothing", "trainer.nothing"),
        ("data.max_response_length=${data.nothing}", "nothing"),
        ("--multirun", "unknown option --multirun"),
        ("--config-name=nothing", "--config-name=nothing: no nothing.yaml in"),
        ("--config-dir=/nowhere", "there is no such folder"),
    ],
)
def test_messages(word, says):
    found = problems(word)
    assert len(found) == 1 and says in found[0]


def test_problems_come_together():
    found = problems("trainer.n_gpu=1", "data.shuffle=maybe", "critic.optim.lr=x", "lr=1", "data.custom_cls.path=/x.py")
    assert len(found) == 5
    error = ConfigError(*found)
    assert pickle.loads(pickle.dumps(error)).problems == found and "5 problems" in str(error)


def test_broken_yaml(tmp_path):
    (tmp_path / "broken.yaml").write_text("data: {train_files: [a\n")
    assert "broken" in problems(f"--config-dir={tmp_path}", "--config-name=broken")[0]
    (tmp_path / "unknown.yaml").write_text("data: {train_file: a}\n")
    assert "data.train_file: unknown key; did you mean data.train_files" in problems(
        f"--config-dir={tmp_path}", "--config-name=unknown"
    )[0]  # fmt: skip


# -- resolving ---------------------------------------------------------------------------------------------------------

NONE_IS_AN_ANSWER = {
    f"{ACTOR}.ppo_micro_batch_size_per_gpu", "custom_reward_function.path", "ray_kwargs.ray_init.num_cpus",
    "ray_kwargs.ray_init.address", "trainer.total_training_steps", "trainer.max_actor_ckpt_to_keep",
    "trainer.resume_from_path", "trainer.debug", "trainer.placement.critic", "trainer.placement.ref",
    "trainer.placement.rollout",
}  # fmt: skip


@pytest.mark.parametrize("machine", [CPU, NODE])
def test_nothing_derived_is_left_open(machine):
    config = resolved(machine=machine).config
    assert {key for key in leaves(PPOConfig) if get(config, key) is None} == NONE_IS_AN_ANSWER
    sft, _ = load(SFTConfig, ["data.train_files=t", "model.path=/m"], "sft")
    filled = resolve(sft, machine, world=1).config
    assert {key for key in leaves(SFTConfig) if get(filled, key) is None} == {"trainer.total_training_steps"}


def test_what_is_derived_from_what():
    run = resolved(
        "data.train_batch_size=64",
        "data.max_response_length=100",
        f"{ACTOR}.clip_ratio=0.3",
        f"{ACTOR}.clip_ratio_high=0.4",
        f"{ACTOR}.ppo_epochs=2",
        f"{ACTOR}.megatron.tensor_model_parallel_size=2",
        f"{ACTOR}.megatron.dtype=float32",
        f"{ROLLOUT}.n=3",
        "trainer.default_local_dir=~/run",
    )
    actor, rollout, critic = run.config.actor_rollout_ref.actor, run.config.actor_rollout_ref.rollout, run.config.critic
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.loss_scale_factor) == (0.3, 0.4, 100.0)
    assert (actor.ppo_mini_batch_size, critic.ppo_mini_batch_size, critic.ppo_epochs) == (64, 64, 2)
    assert critic.megatron.tensor_model_parallel_size == 2 and critic.megatron.sequence_parallel is True
    assert (critic.megatron.dtype, rollout.dtype, rollout.max_model_len) == ("float32", "float32", 612)
    assert run.config.trainer.rollout_data_dir == str(Path("~/run/rollouts").expanduser())
    assert rollout.enforce_eager and not resolved(machine=NODE).config.actor_rollout_ref.rollout.enforce_eager
    assert (run.actor.tp, run.actor.dp, run.critic.tp, run.ref) == (2, 1, 2, None)
    assert (run.batch.samples, run.batch.actor_optimizer_steps) == (192, 2)


def test_sequence_parallelism_is_off_without_tensor_parallelism():
    run = resolved(f"{ACTOR}.megatron.sequence_parallel=true", "critic.megatron.sequence_parallel=true")
    assert run.config.actor_rollout_ref.actor.megatron.sequence_parallel is False and not run.critic.sequence_parallel


def test_pools_of_their_own():
    run = resolved(
        "trainer.n_gpus_per_node=4",
        "trainer.placement.critic=2",
        "critic.megatron.tensor_model_parallel_size=2",
        "trainer.placement.rollout=2",
        f"{ROLLOUT}.tensor_model_parallel_size=2",
        machine=NODE,
    )
    assert (run.actor.ranks, run.critic.ranks, run.critic.tp, run.critic.colocated) == (4, 2, 2, False)
    assert run.critic.sequence_parallel  # the actor, without tensor parallelism, has none to hand down
    assert (run.rollout.replicas, run.rollout.gpus, run.rollout.colocated) == (1, 2, False)
    assert resolved(f"{ROLLOUT}.num_replicas=2").rollout.replicas == 2
    assert resolved("trainer.placement.rollout=2").config.actor_rollout_ref.rollout.num_replicas == 2
    assert resolved("trainer.n_gpus_per_node=8", machine=NODE).rollout.replicas == 8


def test_micro_batch_size_turns_token_budgets_off():
    assert resolved().config.actor_rollout_ref.actor.use_dynamic_bsz is True
    run = resolved(f"{ACTOR}.ppo_micro_batch_size_per_gpu=4", f"{ACTOR}.ppo_max_token_len_per_gpu=1024")
    assert run.config.actor_rollout_ref.actor.use_dynamic_bsz is False
    assert dict(plan_rows(run))["micro-batch"] == "4 samples"


def test_steps_come_from_the_data():
    batch = resolved("data.train_batch_size=64", "trainer.total_epochs=3").batch
    assert (batch.with_data(200).steps_per_epoch, batch.with_data(200).total_steps) == (3, 9)
    assert replace(batch, total_training_steps=5).with_data(200).total_steps == 5
    with pytest.raises(ConfigError, match="data.train_batch_size=64: data.train_files have 63"):
        batch.with_data(63)


def test_plan_table():
    run = resolved(base=SEED)
    rows = dict(plan_rows(run))
    assert rows["step"] == "512 prompts x 1 = 512 samples"
    assert rows["gpu_memory_utilization"].startswith("0.9: not applicable on CPU")
    assert rows["actor"] == rows["critic"] == "8 ranks = TP 1 x PP 1 x DP 8, bfloat16"
    assert rows["mini-batch"].endswith("32 a data-parallel rank") and rows["steps"] == "3 epochs"
    assert dict(plan_rows(replace(run, batch=run.batch.with_data(7473))))["steps"] == "42 (14 an epoch)"
    assert "gpu_memory_utilization" not in dict(plan_rows(resolved(base=SEED, machine=NODE)))


def test_keys_that_a_run_does_not_need_are_said():
    run = resolved(*GRPO, f"{ACTOR}.kl_loss_coef=0.1", "critic.optim.lr=1", "algorithm.lam=0.9", "critic.enable=false")
    assert unused_keys(run) == [f"{ACTOR}.kl_loss_coef", "algorithm.lam", "critic.optim.lr"]
    assert dict(plan_rows(run))["set, not used in this run"].startswith(f"{ACTOR}.kl_loss_coef")
    assert unused_keys(resolved(base=SEED)) == []


def test_supervised_run(monkeypatch):
    argv = ["data.train_files=t", "model.path=/m", "megatron.tensor_model_parallel_size=2"]
    config, _ = load(SFTConfig, argv, "sft")
    check(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    run = resolve(config, CPU)
    assert (run.actor.ranks, run.actor.dp) == (4, 2) and dict(plan_rows(run))["model"].startswith("4 ranks = TP 2")
    with pytest.raises(ConfigError, match="= 2 does not divide the 3 ranks"):
        resolve(config, CPU, world=3)
    for word, says in (
        ("data.max_token_len_per_gpu=10", "data.max_length=1024"),
        ("trainer.test_freq=2", "data.val_files"),
    ):
        with pytest.raises(ConfigError, match=says):
            check(load(SFTConfig, [*argv, word], "sft")[0])


# -- the tables --------------------------------------------------------------------------------------------------------


def test_number_of_keys():
    assert len(leaves(PPOConfig)) + len(leaves(SFTConfig)) < 250
    assert all(item.metadata["doc"].endswith(".") for item in leaves(PPOConfig).values())


def test_tree_is_plain_and_complete():
    tree = tree_of(PPOConfig())
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree and tree["actor_rollout_ref"]["rollout"]["n"] == 1


def test_page_of_keys_is_up_to_date():
    page = (ROOT / "docs" / "config_keys.md").read_text()
    assert page == config_module.markdown() + "\n", "run `python -m hybridrl.config > docs/config_keys.md`"
