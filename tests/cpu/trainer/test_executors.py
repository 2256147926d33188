"""torchrun's ranks with rank 0 driving give Ray's numbers; runs of one half only, from and to the tables."""

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from test_end_to_end import ROOT, arguments, leftovers, metrics, run, world  # noqa: F401

MAIN = "hybridrl.trainer.main_ppo"
NUMBERS = ("actor/pg_loss", "actor/grad_norm", "critic/score/mean", "response_length/mean")
GRPO = "algorithm.adv_estimator=grpo"
LOCAL = ["trainer.executor=local", "trainer.n_gpus_per_node=1", GRPO, "trainer.total_training_steps=2"]


def torchrun(args: list, expect: int) -> str:
    mark = f"torchrun-{os.getpid()}-{expect}"
    env = os.environ | {"MODULE": MAIN, "PYTHON": sys.executable, "HYBRIDRL_TEST_RUN": mark}
    command = ["bash", ROOT / "launch/torchrun.sh", "2", *args]
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-5000:]
    assert not leftovers(mark)
    return done.stdout + done.stderr


def test_torchrun_gives_the_numbers_of_ray(world, tmp_path):  # noqa: F811
    split = [GRPO, "trainer.total_training_steps=2", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2"]
    torchrun(arguments(world, tmp_path / "torchrun", *split, "trainer.executor=torchrun", "trainer.save_freq=2"), 0)
    run(MAIN, arguments(world, tmp_path / "ray", *split))
    one, two = metrics(tmp_path / "torchrun"), metrics(tmp_path / "ray")
    for step in (1, 2):
        assert {name: one[step][name] for name in NUMBERS} == {name: two[step][name] for name in NUMBERS}
    assert len(list((tmp_path / "torchrun/global_step_2/actor").glob("rank_*"))) == 2


def test_an_error_on_rank_0_ends_torchruns_ranks(world, tmp_path):  # noqa: F811
    """Found before there are workers, and found on all ranks alike."""
    args = arguments(world, tmp_path / "run", GRPO, "trainer.executor=torchrun")
    out = torchrun([*args, f"custom_reward_function.path={world / 'data/train.parquet'}"], 1)
    assert "custom_reward_function" in out
    out = torchrun([*args, "trainer.n_gpus_per_node=3"], 1)
    assert "torchrun started 2 ranks" in out
    out = torchrun([*args, "trainer.executor=ray"], 1)
    assert "set trainer.executor=torchrun" in out


def test_torchrun_is_needed_for_its_executor(world, tmp_path):  # noqa: F811
    out = run(MAIN, arguments(world, tmp_path / "run", "trainer.executor=torchrun"), expect=2)
    assert "torchrun --nproc_per_node" in out


def test_rollout_only_then_train_only_equals_one_run(world, tmp_path):  # noqa: F811
    run(MAIN, arguments(world, tmp_path / "whole", *LOCAL))
    whole = metrics(tmp_path / "whole")
    run(MAIN, arguments(world, tmp_path / "rollout", *LOCAL, "trainer.debug=rollout"))
    tables = [pq.read_table(tmp_path / name / "rollouts/step_1.parquet") for name in ("whole", "rollout")]
    assert tables[0]["response_ids"].equals(tables[1]["response_ids"]) and "advantages" not in tables[1].column_names
    assert metrics(tmp_path / "rollout")[1]["critic/score/mean"] == whole[1]["critic/score/mean"]
    # Trained on the tables: the same, bit for bit. The second step's samples are those of the trained weights.
    here = f"trainer.rollout_data_dir={tmp_path / 'whole/rollouts'}"
    written = (tmp_path / "whole/rollouts/step_1.parquet").stat().st_mtime_ns
    # A reward function that gives nothing: train does not ask it, replay does.
    (world / "none.py").write_text("def digits(*args, **kwargs):\n    return 0.0\n")
    other = [here, f"custom_reward_function.path={world / 'none.py'}"]
    run(MAIN, arguments(world, tmp_path / "train", *LOCAL, "trainer.debug=train", *other))
    found = metrics(tmp_path / "train")
    for step in (1, 2):
        assert {name: found[step][name] for name in NUMBERS} == {name: whole[step][name] for name in NUMBERS}
    assert "training/rollout_logprobs_diff_max" in found[2] and "weight_sync/load_s" not in found[2]
    run(MAIN, arguments(world, tmp_path / "replay", *LOCAL, "trainer.debug=replay", *other))
    assert metrics(tmp_path / "replay")[1]["critic/score/mean"] == 0.0
    assert (tmp_path / "whole/rollouts/step_1.parquet").stat().st_mtime_ns == written


@pytest.mark.parametrize("change, words", [
    ("trainer.total_training_steps=3", "step_3.parquet"),
    ("data.train_batch_size=8", "32 samples"),
    ("trainer.val_only=true", "trainer.val_only"),
])  # fmt: skip
def test_tables_that_do_not_fit_are_refused(world, tmp_path, change, words):  # noqa: F811
    import shutil

    (tmp_path / "rollouts").mkdir()
    table = pq.read_table(world / "data/train.parquet").slice(0, 32)
    pq.write_table(table, tmp_path / "rollouts/step_1.parquet")
    shutil.copy(tmp_path / "rollouts/step_1.parquet", tmp_path / "rollouts/step_2.parquet")
    args = arguments(world, tmp_path / "run", *LOCAL, "trainer.debug=train", "actor_rollout_ref.actor.ppo_epochs=1")
    folder = f"trainer.rollout_data_dir={tmp_path / 'rollouts'}"
    small = ["actor_rollout_ref.actor.ppo_mini_batch_size=8"] if "batch" in change else []
    assert words in run(MAIN, [*args, folder, change, *small], expect=2)
