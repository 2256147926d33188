"""The pool: order, speed, timeouts, crashes, bad results, the parent's death; each costs its own sample only."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from hybridrl.rewards.manager import RewardManager

NAUGHTY = """
import ctypes, os, sys, time
import signal

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "hang": time.sleep(1000)
    if solution_str == "spin":
        while True: pass
    if solution_str == "stubborn":
        for s in (signal.SIGTERM, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
        time.sleep(1000)
    if solution_str == "exit": os._exit(3)
    if solution_str == "sysexit": sys.exit(3)
    if solution_str == "segv": ctypes.string_at(0)
    if solution_str == "raise": raise KeyError("lost")
    if solution_str == "nan": return float("nan")
    if solution_str == "none": return None
    if solution_str == "text": return {"score": "1"}
    if solution_str == "deep":
        def f(): return f()
        return f()
    if solution_str == "closed": os.close(int(sys.argv[1]))
    if solution_str == "info": return {"score": extra_info["x"], "acc": True, "note": "words", "big": 2}
    return float(solution_str)
"""


@pytest.fixture(scope="module")
def naughty(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "naughty.py"
    file.write_text(NAUGHTY)
    with RewardManager(2, 0.7, str(file)) as manager:
        yield manager


def score(manager, solutions, source="arithmetic", truth="1", info="{}"):
    n = len(solutions)
    return manager.score([source] * n, solutions, [truth] * n, [info] * n)


def test_order_and_extras(naughty):
    result = score(naughty, [str(i) for i in range(100)])
    assert result.scores.tolist() == list(range(100)) and result.scores.dtype == np.float32
    assert result.failures == [] and result.extras == {} and set(result.metrics.values()) == {0.0}
    result = score(naughty, ["info", "4"], info='{"x": 2.5}')
    assert result.scores.tolist() == [2.5, 4]
    assert set(result.extras) == {"acc", "big"} and result.extras["big"][0] == 2 and np.isnan(result.extras["acc"][1])
    empty = score(naughty, [])
    assert empty.scores.shape == (0,) and empty.failures == []


@pytest.mark.parametrize("bad, kind, message", [
    ("hang", "timeout", "reward.timeout_s=0.7"),
    ("spin", "timeout", "reward.timeout_s=0.7"),
    ("stubborn", "timeout", "reward.timeout_s=0.7"),
    ("exit", "crash", "exit code 3"),
    ("segv", "crash", "SIGSEGV"),
    ("closed", "", ""),
    ("sysexit", "error", "SystemExit"),
    ("raise", "error", "KeyError: 'lost'"),
    ("deep", "error", "RecursionError"),
    ("nan", "error", "nan"),
    ("none", "error", "None"),
    ("text", "error", "not a finite number"),
])
def test_a_bad_sample_costs_itself_only(naughty, bad, kind, message):
    solutions = [str(i) for i in range(60)]
    solutions[20] = bad
    result = score(naughty, solutions)
    assert result.scores.tolist() == [0.0 if i == 20 else float(i) for i in range(60)]
    [(index, found, text)] = result.failures
    assert index == 20 and kind in found and message in text
    assert sum(result.metrics.values()) == 1


def test_many_bad_samples_at_once(naughty):
    solutions = ["exit", "1", "raise", "hang", "2", "segv", "hang", "3"] + ["exit"] * 10 + ["4"]
    result = score(naughty, solutions)
    assert result.scores.tolist() == [0, 1, 0, 0, 2, 0, 0, 3] + [0] * 10 + [4]
    assert result.metrics == {"reward/num_timeouts": 2, "reward/num_crashes": 12, "reward/num_errors": 1}
    assert [f[0] for f in result.failures] == [0, 2, 3, 5, 6, *range(8, 18)]


def test_worker_killed_between_calls_is_replaced_without_blame(naughty):
    for w in naughty._workers:
        w.process.kill()
        w.process.wait()
    result = score(naughty, ["1"] * 40)
    assert result.scores.sum() == 40 and not result.failures


def test_calls_from_threads(naughty):
    sums, threads = [], []
    for k in range(4):
        threads.append(threading.Thread(target=lambda k=k: sums.append(score(naughty, [str(k)] * 50).scores.sum())))
        threads[-1].start()
    for t in threads:
        t.join()
    assert sorted(sums) == [0, 50, 100, 150]


def test_speed_and_no_torch_in_workers():
    with RewardManager(2, 5.0) as manager:
        score(manager, ["#### 1"] * 64)
        start = time.perf_counter()
        result = score(manager, ["1+0=1 #### 1", "#### 2"] * 512)
        seconds = time.perf_counter() - start
        assert result.scores.sum() == 512 == result.extras["acc"].sum()
        assert seconds < 0.5, f"1,024 samples took {seconds:.2f} s"
        for w in manager._workers:
            with open(f"/proc/{w.process.pid}/maps") as maps:
                assert "libtorch" not in maps.read()


def test_math_library_runs_in_the_pool_and_hostile_input_is_bounded():
    solutions = [r"\boxed{\frac{2}{4}}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}", r"\boxed{0.5}"]
    with RewardManager(2, 3.0) as manager:
        start = time.monotonic()
        result = manager.score(["lighteval/MATH"] * 4, solutions, [r"\frac12"] * 4, ["{}"] * 4)
        assert result.scores.tolist() == [1, 0, 0, 1] and time.monotonic() - start < 60


def test_unknown_source_and_bad_numbers():
    with RewardManager(1, 1.0) as manager:
        with pytest.raises(ValueError, match="'poems'"):
            score(manager, ["1"], source="poems")
        manager.check(["arithmetic", "openai/gsm8k"])
    with pytest.raises(ValueError, match="reward.num_workers=0"):
        RewardManager(0, 1.0)
    with pytest.raises(ValueError, match="reward.timeout_s=0"):
        RewardManager(1, 0)


@pytest.mark.parametrize("text, match", [
    ("import nothing_like_that", "custom_reward_function.path.*does not import"),
    ("import os; os._exit(1)", "custom_reward_function.path.*ended the process"),
    ("x = 1", "custom_reward_function.name"),
])
def test_custom_function_is_checked_at_once(tmp_path, text, match):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
        RewardManager(2, 1.0, str(file))
    with pytest.raises(ValueError, match="no such file"):
        RewardManager(2, 1.0, str(tmp_path / "none.py"))


def test_a_file_broken_during_the_run_is_named_and_leaves_no_process(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(NAUGHTY)
    manager = RewardManager(2, 0.5, str(file))
    first = [w.process.pid for w in manager._workers]
    file.write_text("x = 1")
    with pytest.raises(ValueError, match="custom_reward_function.name"):
        score(manager, ["exit"] * 40)
    assert not any(alive(pid) for pid in first) and manager._workers == []


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_workers_die_with_a_killed_parent(tmp_path, state):
    (tmp_path / "slow.py").write_text("import time\ndef compute_score(**kwargs):\n    time.sleep(100)\n")
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
        import threading, time
        from hybridrl.rewards.manager import RewardManager
        m = RewardManager(2, 90.0, {str(tmp_path / 'slow.py')!r})
        if {state!r} == "busy":
            threading.Thread(target=m.score, args=(["a"] * 9, ["b"] * 9, ["c"] * 9, ["{{}}"] * 9), daemon=True).start()
            time.sleep(0.5)
        print(*(w.process.pid for w in m._workers), flush=True)
        time.sleep(100)
        """)], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(p) for p in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 5
    while any(alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(p) for p in pids)


def test_close_leaves_no_process():
    manager = RewardManager(2, 1.0)
    pids = [w.process.pid for w in manager._workers]
    manager.close()
    manager.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
