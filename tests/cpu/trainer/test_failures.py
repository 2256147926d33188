"""What a run does when its processes are killed: a rollout engine, a training rank, the whole run by signal. Real runs
of main_ppo; none may leave a process behind.
"""

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from test_end_to_end import arguments, leftovers, metrics, run, start, world  # noqa: F401

MAIN = "hybridrl.trainer.main_ppo"
QUICK = ["trainer.total_training_steps=500", "trainer.val_before_train=false", "algorithm.adv_estimator=grpo"]
LONG = ["data.max_response_length=192", "actor_rollout_ref.rollout.num_replicas=2", "algorithm.adv_estimator=grpo"]


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    yield
    for process in psutil.Process().children():
        if MAIN in process.cmdline():
            process.send_signal(signal.SIGINT)
            process.wait(60)


def wait_for_file(process, path: Path, seconds: float = 420) -> None:
    deadline = time.time() + seconds
    while time.time() < deadline and not path.exists():
        assert process.poll() is None, process.stdout.read()[-6000:]
        time.sleep(0.05)
    assert path.exists()


def descendants(pid: int, title: str) -> list[psutil.Process]:
    """Processes below `pid` with `title` in the name that they gave themselves. (Ray and vLLM write such names over the
    environment that a process was started with, the mark included.)"""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if title in "".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_engine_is_replaced_and_changes_nothing(world, tmp_path):  # noqa: F811
    """kill -9 of an EngineCore while step 2 is generated: same tokens, same metrics as a run left alone."""
    arguments_of = lambda name: arguments(world, tmp_path / name, *LONG)  # noqa: E731
    process = start(MAIN, arguments_of("killed"))
    wait_for_file(process, tmp_path / "killed/rollouts/step_1.parquet")
    time.sleep(0.3)
    descendants(process.pid, "EngineCore")[0].kill()
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-6000:]
    assert not leftovers(process.mark)
    run(MAIN, arguments_of("left"))
    killed, left = metrics(tmp_path / "killed"), metrics(tmp_path / "left")
    assert [killed[step]["rollout/replica_restarts"] for step in (1, 2, 3)] == [0, 1, 0]
    assert [left[step]["rollout/replica_restarts"] for step in (1, 2, 3)] == [0, 0, 0]
    for step in (1, 2, 3):
        one, two = (pq.read_table(tmp_path / name / f"rollouts/step_{step}.parquet") for name in ("killed", "left"))
        keys = list(zip(one["uid"].to_pylist(), one["sample"].to_pylist(), strict=True))
        assert len(keys) == len(set(keys)) == 32 and set(one["weight_version"].to_pylist()) == {step - 1}
        assert one["uid"].equals(two["uid"]) and one["response_ids"].equals(two["response_ids"])
    assert killed[3]["actor/pg_loss"] == left[3]["actor/pg_loss"]


def test_a_killed_rank_ends_the_run_which_resumes(world, tmp_path):  # noqa: F811
    args = arguments(world, tmp_path / "run", "trainer.save_freq=1", *QUICK)
    process = start(MAIN, args)
    wait_for_file(process, tmp_path / "run/latest_checkpointed_iteration.txt")
    ranks = descendants(process.pid, "_Rank")
    assert len(ranks) == 2
    ranks[1].kill()
    began = time.time()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - began < 60, out[-6000:]
    assert re.search(r"error: rank [01] of pool 'actor' died", out) and "Traceback" not in out, out[-6000:]
    step = int(re.search(r"goes on from \S*global_step_(\d+)", out)[1])
    assert not leftovers(process.mark)
    assert not any(rank.is_running() for rank in ranks)
    again = run(MAIN, [*args, f"trainer.total_training_steps={step + 1}"])
    assert f"global_step_{step}" in again and max(metrics(tmp_path / "run")) == step + 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_signal_ends_every_process(world, tmp_path, sent):  # noqa: F811
    process = start(MAIN, arguments(world, tmp_path / "run", *QUICK))
    wait_for_file(process, tmp_path / "run/rollouts/step_1.parquet")
    ranks = descendants(process.pid, "_Rank")
    os.kill(process.pid, sent)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out[-4000:]
    assert "interrupted" in out and not leftovers(process.mark)
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks)
