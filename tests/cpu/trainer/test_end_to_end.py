"""main_ppo, main_sft and main_eval as a user starts them: real Ray, Megatron and vLLM, small model, a few steps each.

Every run must end with no process of its own left, and its numbers must agree with each other: on-policy ratios are 1,
the trainer's and vLLM's log-probs match, what is exported loads in transformers.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

ROOT = Path(__file__).parents[3]
STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with arithmetic data and a small random checkpoint."""
    folder = tmp_path_factory.mktemp("e2e")
    make = [sys.executable, "-m", "hybridrl.data.preprocess.arithmetic", "--local_dir", folder / "data"]
    subprocess.run([*make, "--sft_size", "256", "--train_size", "256", "--test_size", "32"], check=True, cwd=ROOT)
    tiny = [sys.executable, "-m", "hybridrl.data.tiny_model", "--out", folder / "model"]
    subprocess.run([*tiny, "--data", folder / "data" / "sft_train.parquet"], check=True, cwd=ROOT)
    # Any answer earns something, so that gradients are not zero from a random model.
    (folder / "reward.py").write_text(
        "def digits(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    share = sum(c.isdigit() for c in solution_str) / max(len(solution_str), 1)\n"
        "    return {'score': share, 'acc': float(share > 0.5)}\n"
    )
    return folder


def arguments(world: Path, run: Path, *extra: str) -> list[str]:
    base = {
        "data.train_files": world / "data/train.parquet",
        "data.val_files": world / "data/test.parquet",
        "data.train_batch_size": 16,
        "data.max_prompt_length": 64,
        "data.max_response_length": 24,
        "actor_rollout_ref.model.path": world / "model",
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "actor_rollout_ref.actor.megatron.dtype": "float32",
        "actor_rollout_ref.rollout.n": 2,
        "critic.optim.lr": 1e-3,
        "custom_reward_function.path": world / "reward.py",
        "custom_reward_function.name": "digits",
        "trainer.n_gpus_per_node": 2,
        "trainer.total_training_steps": STEPS,
        "trainer.default_local_dir": run,
        "trainer.report": "false",
    }
    return [f"{key}={value}" for key, value in base.items()] + list(extra)


def start(module: str, args: list[str]) -> subprocess.Popen:
    """The mark in its environment is inherited by every process of the run, Ray's and vLLM's too."""
    mark = f"{os.getpid()}-{time.time_ns()}"
    env = os.environ | {"PYTHONWARNINGS": "ignore", "HYBRIDRL_TEST_RUN": mark}
    command = [sys.executable, "-m", module, *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process.mark = mark
    return process


def run(module: str, args: list[str], expect: int = 0, timeout: float = 300) -> str:
    process = start(module, args)
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == expect, out[-6000:]
    assert not leftovers(process.mark)
    return out


def leftovers(mark: str) -> list[str]:
    """Processes of that run that do not end within ten seconds."""
    found = []
    for _ in range(40):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HYBRIDRL_TEST_RUN") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:150]}")
            except psutil.Error:
                continue
        if not found:
            return []
        time.sleep(0.25)
    return found


def metrics(folder: Path) -> dict[int, dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["metrics"] for row in map(json.loads, lines)}


def check_run(folder: Path, critic: bool = True) -> dict[int, dict]:
    found = metrics(folder)
    assert [s for s in found if s > 0] == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        m = found[step]
        # fp32 on both sides: the weights that vLLM samples with are the trainer's of this very step.
        assert m["training/rollout_logprobs_diff_max"] < 1e-4, (step, m["training/rollout_logprobs_diff_max"])
        assert m["actor/grad_norm"] > 0 and m["actor/skipped_steps"] == 0
        assert m["actor/ppo_kl"] == 0.0 and m["actor/pg_clipfrac"] == 0.0  # one mini-batch: ratio exactly 1
        if critic:
            assert m["critic/grad_norm"] > 0
        rollouts = pq.read_table(folder / "rollouts" / f"step_{step}.parquet")
        assert rollouts.num_rows == 32 and set(rollouts["weight_version"].to_pylist()) == {step - 1}
    return found


SPLITS = {
    "tp2_sp": [
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2",
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_ctrl.type=adaptive",
    ],
    "pp2": [
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.entropy_coeff=0.001",
    ],
    "dp2": ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256", "actor_rollout_ref.actor.use_kl_loss=true"],
}


@pytest.mark.parametrize("split", SPLITS)
def test_ppo_runs_with_critic_in_every_split(world, tmp_path, split):
    export = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
    out = run(
        "hybridrl.trainer.main_ppo", arguments(world, tmp_path / "run", "trainer.save_freq=3", export, *SPLITS[split])
    )
    found = check_run(tmp_path / "run")
    assert "gpu_memory_utilization" in out and "not applicable on CPU" in out
    if split == "tp2_sp":
        assert found[1]["actor/reward_kl_penalty"] == 0.0 and found[3]["actor/reward_kl_penalty"] != 0.0
        assert found[3]["actor/reward_kl_penalty_coeff"] != found[1]["actor/reward_kl_penalty_coeff"]
    else:
        assert found[1]["actor/kl_loss"] == 0.0 and found[3]["actor/kl_loss"] > 0.0
    exported_model_loads(tmp_path / "run/global_step_3/actor/huggingface", tmp_path / "run")


def exported_model_loads(folder: Path, run_dir: Path) -> None:
    """transformers gives the log-probs that the trainer had for a sample of an earlier step, to within training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    row = pq.read_table(run_dir / "rollouts/step_3.parquet").to_pylist()[0]
    with torch.no_grad():
        logits = model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
    first = len(row["prompt_ids"]) - 1
    logp = torch.log_softmax(logits, -1)[first:-1].gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]
    drift = (logp - torch.tensor(row["old_logprobs"])).abs().max()
    assert 0 < drift < 1.0  # one more update lies between them


def test_pools_of_their_own(world, tmp_path):
    """Critic, reference and rollout apart from the actor: one rank each."""
    pools = ["trainer.placement.critic=1", "trainer.placement.ref=1", "trainer.placement.rollout=1"]
    rest = ["trainer.n_gpus_per_node=1", "actor_rollout_ref.actor.use_kl_loss=true"]
    run("hybridrl.trainer.main_ppo", arguments(world, tmp_path / "run", *pools, *rest))
    check_run(tmp_path / "run")


def test_local_executor_runs_the_same_loop_without_ray(world, tmp_path):
    extra = ["trainer.executor=local", "trainer.n_gpus_per_node=1", "algorithm.adv_estimator=grpo"]
    run("hybridrl.trainer.main_ppo", arguments(world, tmp_path / "run", *extra))
    check_run(tmp_path / "run", critic=False)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_plus_plus"])
def test_other_estimators(world, tmp_path, estimator):
    """Several mini-batches, epochs and micro-batches of a fixed number of samples, bf16."""
    extra = [
        f"algorithm.adv_estimator={estimator}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.shuffle=true",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=5",
        "trainer.executor=local",
        "trainer.n_gpus_per_node=1",
        "actor_rollout_ref.actor.megatron.dtype=bfloat16",
    ]
    run("hybridrl.trainer.main_ppo", arguments(world, tmp_path / "run", *extra))
    found = metrics(tmp_path / "run")
    assert found[3]["actor/ppo_kl"] != 0.0 and found[3]["training/rollout_logprobs_diff_mean"] < 0.05


def test_resume_goes_on_from_the_newest_whole_checkpoint(world, tmp_path):
    args = arguments(
        world,
        tmp_path / "run",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=1",
        "trainer.executor=local",
        "trainer.n_gpus_per_node=1",
    )
    run("hybridrl.trainer.main_ppo", [*args, "trainer.total_training_steps=2"])
    stale = tmp_path / "run/global_step_9.tmp"  # as a killed save leaves it
    stale.mkdir()
    out = run("hybridrl.trainer.main_ppo", args)
    assert "resuming from" in out and "global_step_2" in out
    check_run(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").glob("global_step_*")] != []
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text().strip() == "3"
    straight = arguments(world, tmp_path / "straight", "trainer.executor=local", "trainer.n_gpus_per_node=1")
    run("hybridrl.trainer.main_ppo", straight)
    one, two = metrics(tmp_path / "run")[3], metrics(tmp_path / "straight")[3]
    for name in ("actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "critic/score/mean", "response_length/mean"):
        assert one[name] == two[name], name  # bit for bit, rollouts included


def test_a_learning_rate_of_zero_fails_the_gate(world, tmp_path):
    """The gate that quickstart ends with must not pass by itself."""
    extra = [
        "actor_rollout_ref.actor.optim.lr=0",
        "critic.optim.lr=0",
        "actor_rollout_ref.actor.optim.weight_decay=0",
        "trainer.test_freq=1",
        "trainer.executor=local",
        "trainer.n_gpus_per_node=1",
    ]
    run("hybridrl.trainer.main_ppo", arguments(world, tmp_path / "run", *extra))
    found = metrics(tmp_path / "run")
    accuracies = {m["val-core/arithmetic/acc/mean@1"] for m in found.values()}
    assert len(found) == STEPS + 1 and len(accuracies) == 1  # nothing moved
    gate = ["--metric", "val-core/arithmetic/acc/mean@1", "--min-final", "0.7", "--min-ratio", "2"]
    run("hybridrl.telemetry.check", [tmp_path / "run", *gate], expect=1)


def test_a_users_command_of_verl_runs_unchanged(world, tmp_path):
    """verl's own PPO example, with the model and the number of ranks of this machine."""
    args = [
        f"data.train_files={world / 'data/train.parquet'}",
        f"data.val_files={world / 'data/test.parquet'}",
        "data.train_batch_size=64",
        "data.max_prompt_length=256",
        "data.max_response_length=32",
        f"actor_rollout_ref.model.path={world / 'model'}",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.9",
        f"critic.model.path={world / 'model'}",
        "critic.optim.lr=1e-5",
        "trainer.n_gpus_per_node=2",
        "trainer.nnodes=1",
        "trainer.project_name=verl_example",
        "trainer.experiment_name=qwen2_7b_gsm8k",
        "trainer.total_epochs=1",
        "trainer.logger=['console']",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    ]
    run("hybridrl.trainer.main_ppo", args)
    found = metrics(tmp_path / "run")
    assert sorted(found) == [0, 1, 2, 3, 4]  # 256 prompts, 64 a step
    assert found[4]["actor/lr"] == 1e-6 and found[4]["critic/lr"] == 1e-5


def test_supervised_warm_start_then_eval(world, tmp_path):
    """torchrun with two ranks; the loss falls; main_eval scores the export."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "hybridrl.trainer.main_sft",
    ]
    args = [
        f"data.train_files={world / 'data/sft_train.parquet'}",
        f"model.path={world / 'model'}",
        "data.train_batch_size=64",
        "optim.lr=3e-3",
        "megatron.tensor_model_parallel_size=2",
        "megatron.dtype=float32",
        "trainer.total_training_steps=12",
        f"trainer.default_local_dir={tmp_path / 'sft'}",
    ]
    subprocess.run([*torchrun, *args], check=True, cwd=ROOT, timeout=200, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    found = metrics(tmp_path / "sft")
    assert found[12]["train/loss"] < 0.7 * found[1]["train/loss"]
    evaluated = run(
        "hybridrl.trainer.main_eval",
        [
            f"actor_rollout_ref.model.path={tmp_path / 'sft/global_step_12/huggingface'}",
            f"data.val_files={world / 'data/test.parquet'}",
            "data.max_prompt_length=64",
            "data.max_response_length=24",
            f"trainer.default_local_dir={tmp_path / 'eval'}",
        ],
    )
    assert "val-core/arithmetic/acc/mean@1" in evaluated
