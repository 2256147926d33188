"""Seeds, refused settings, sharing of a batch, light imports and the reaper: nothing here starts an engine."""

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
from rollout_helpers import prompt_table, sampling, server_settings

from hybridrl.rollout import reaper
from hybridrl.rollout.fleet import RolloutFleet, share_prompts
from hybridrl.rollout.sampling import request_seed


def test_request_seed_is_stable_and_depends_on_everything():
    # A literal: another Python version or a restarted run must draw the same.
    assert request_seed(7, "p0", 0, 3) == 6461519347598250327
    base = (7, "p0", 0, 3)
    others = [(8, "p0", 0, 3), (7, "p1", 0, 3), (7, "p0", 1, 3), (7, "p0", 0, 4)]
    seeds = {request_seed(*args) for args in [base, *others]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("change, words", [
    ({"temperature": -0.1}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_k": -2}, "top_k"),
    ({"max_tokens": 0}, "max_response_length"),
])
def test_impossible_sampling_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        sampling(**change)


@pytest.mark.parametrize("change, words", [
    ({"model_path": "/no/such/folder"}, "model.path"),
    ({"max_num_seqs": 2048}, "max_num_batched_tokens"),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 128}, "without chunked prefill"),
])
def test_impossible_server_settings_are_refused(models, change, words):
    with pytest.raises(ValueError, match=words):
        server_settings(**{"model_path": models[0]} | change)


def test_local_executor_has_one_replica(models):
    with pytest.raises(ValueError, match="num_replicas=1"):
        RolloutFleet(server_settings(models[0]), num_replicas=2, executor="local")


def test_shares_cover_the_batch_keep_groups_and_balance():
    prompts = prompt_table([[1] * length for length in (100, 10, 10, 80, 5, 60)], n=4)
    shares = share_prompts(prompts, 2, response_tokens=20)
    assert sorted(row for share in shares for row in share) == list(range(24))
    groups = [{row // 4 for row in share} for share in shares]
    assert not groups[0] & groups[1]  # the samples of a prompt stay where its prefix is cached
    lengths = [100, 10, 10, 80, 5, 60]
    costs = [sum(lengths[group] + 80 for group in share) for share in groups]
    assert max(costs) - min(costs) <= 25, costs  # the best there is


def test_fewer_prompts_than_replicas_share_samples():
    assert sorted(map(len, share_prompts(prompt_table([[1, 2]], n=4), 3, 10))) == [1, 1, 2]
    assert share_prompts(prompt_table([[1, 2]]), 3, 10) == [[0]]


def test_fleet_imports_neither_vllm_nor_ray():
    code = ("import sys, hybridrl.rollout.fleet; bad = {'vllm', 'ray', 'torch', 'megatron'} & set(sys.modules); "
            "assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reaper_ends_what_a_killed_owner_left():
    mark = f"HYBRIDRL_TEST={uuid.uuid4().hex}"
    # The owner starts the reaper as the server does, then a marked child that ignores SIGTERM, and prints when ready.
    owner = subprocess.Popen([sys.executable, "-c", f"""
import os, subprocess, sys, time
reaper = subprocess.Popen([sys.executable, "-I", "-S", {reaper.__file__!r}, {mark!r}], stdin=subprocess.PIPE)
reaper.wait()
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
key, value = {mark!r}.split("=")
subprocess.Popen([sys.executable, "-c", child], env=os.environ | {{key: value}}, start_new_session=True)
time.sleep(300)
"""], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"up\n"
    assert len(reaper.marked_pids(mark)) == 1
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 2 * reaper.GRACE_S + 5
    while reaper.marked_pids(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not reaper.marked_pids(mark)
