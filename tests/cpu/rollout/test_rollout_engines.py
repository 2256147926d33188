"""Real vLLM engines: one in this process that starts from dummy weights, two under Ray that load a checkpoint.

Engines are shared by the tests, since a start costs 15 to 30 s; the last two tests end them.
"""

import os
import signal
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
from rollout_helpers import EOS, VOCABULARY, prompt_table, sampling, server_settings

from hybridrl.data.trajectories import Trajectories
from hybridrl.rollout.fleet import RolloutFleet

LENGTHS = (3, 17, 40, 9, 130, 64)
PROMPTS = [np.random.default_rng(i).integers(3, VOCABULARY, n).tolist() for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def local(models):
    """Started with random weights, then given models[0] as version 5. Every test leaves models[0] in it."""
    fleet = RolloutFleet(server_settings(models[0], load_format="dummy"), executor="local")
    fleet.start()
    dummy = fleet.generate(prompt_table(PROMPTS[:1]), sampling(max_tokens=2), step=0)
    assert dummy["weight_version"].to_pylist() == [-1]
    facts = fleet.update_weights(models[0], 5)
    assert facts["bytes"] == os.path.getsize(f"{models[0]}/model.safetensors") and 0 < facts["seconds"] < 30
    yield fleet
    fleet.shutdown()


@pytest.fixture(scope="module")
def remote(models):
    """(fleet, facts) of two replicas under Ray that loaded models[1]."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    fleet = RolloutFleet(server_settings(models[1]), num_replicas=2)
    facts = fleet.start()
    yield fleet, facts
    fleet.shutdown()
    ray.shutdown()


def columns(table: pa.Table) -> tuple[list, list]:
    return table["response_ids"].to_pylist(), table["rollout_logprobs"].to_pylist()


def reference_logprobs(path: str, prompt: list[int], response: list[int], temperature: float) -> np.ndarray:
    """log_softmax(logits / temperature) of transformers' model, of the response tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    return torch.log_softmax(logits / temperature, -1)[torch.arange(len(response)), torch.tensor(response)].numpy()


def test_order_columns_and_lengths(local):
    prompts = prompt_table(PROMPTS, n=3)
    table = local.generate(prompts, sampling(ignore_eos=True), step=1)
    assert table.column_names == ["uid", "sample", "response_ids", "rollout_logprobs", "finish_reason",
                                  "weight_version"]
    assert table["uid"].equals(prompts["uid"]) and table["sample"].equals(prompts["sample"])
    assert table["response_ids"].type == pa.list_(pa.int32())
    assert table["rollout_logprobs"].type == pa.list_(pa.float32())
    assert set(Trajectories(table).lengths("response_ids")) == {24}
    assert np.array_equal(Trajectories(table).lengths("rollout_logprobs"), Trajectories(table).lengths("response_ids"))
    assert set(table["finish_reason"].to_pylist()) == {"length"} and set(table["weight_version"].to_pylist()) == {5}
    values, _ = Trajectories(table).flat("rollout_logprobs")
    assert np.isfinite(values).all() and (values <= 0).all()
    responses = columns(table)[0]
    assert len({tuple(r) for r in responses}) == len(responses)  # samples of a prompt differ


def test_logprobs_are_those_of_transformers(local, models):
    for temperature in (1.0, 0.6):
        table = local.generate(prompt_table(PROMPTS), sampling(temperature=temperature, ignore_eos=True), step=2)
        for prompt, ids, logprobs in zip(PROMPTS, *columns(table)):
            expected = reference_logprobs(models[0], prompt, ids, temperature)
            assert np.abs(expected - np.array(logprobs)).max() < 1e-3


def test_eos_and_stop_ids_end_a_response_and_are_part_of_it(local):
    free = columns(local.generate(prompt_table(PROMPTS), sampling(ignore_eos=True), step=3))
    stop = free[0][1][7]  # the same seeds draw it again
    stopped = local.generate(prompt_table(PROMPTS), sampling(stop_token_ids=(stop,)), step=3)
    reasons = stopped["finish_reason"].to_pylist()
    for full, ids, logprobs, reason in zip(free[0], *columns(stopped), reasons):
        ends = [i for i, token in enumerate(full) if token in (stop, EOS)]
        cut = ends[0] + 1 if ends else len(full)
        assert ids == full[:cut] and len(logprobs) == cut and reason == ("stop" if ends else "length")
    assert "stop" in reasons
    # ignore_eos turns stop_token_ids off, too
    ignored = local.generate(prompt_table(PROMPTS), sampling(stop_token_ids=(stop,), ignore_eos=True), step=3)
    assert columns(ignored)[0] == free[0]


def test_eos_of_the_generation_config_stops(local):
    # Rare in a random model: enough samples that some draw it.
    table = local.generate(prompt_table(PROMPTS, n=40), sampling(max_tokens=48), step=4)
    for ids, reason in zip(columns(table)[0], table["finish_reason"].to_pylist()):
        assert (reason == "stop") == (ids[-1] == EOS) and EOS not in ids[:-1]
    assert "stop" in table["finish_reason"].to_pylist()


def test_seeds_fix_a_request_whatever_the_batch(local):
    prompts = prompt_table(PROMPTS, n=4)
    base = local.generate(prompts, sampling(), step=6)
    again = local.generate(prompts, sampling(), step=6)
    assert columns(again) == columns(base)  # the same batch: bit for bit, although the second reads cached prefixes
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = Trajectories(local.generate(prompts.take(order), sampling(), step=6)).take(np.argsort(order)).table
    assert columns(shuffled)[0] == columns(base)[0]
    # Another batch composition may use another kernel path, so log-probs are compared with a tolerance.
    alone = columns(local.generate(prompts.slice(9, 1), sampling(), step=6))
    assert alone[0][0] == columns(base)[0][9]
    assert np.abs(np.array(alone[1][0]) - np.array(columns(base)[1][9])).max() < 1e-4
    for changed in (local.generate(prompts, sampling(), step=7), local.generate(prompts, sampling(seed=8), step=6)):
        assert columns(changed)[0] != columns(base)[0]


def test_bad_prompts_are_refused(local):
    with pytest.raises(ValueError, match="max_model_len"):
        local.generate(prompt_table([[5] * 250]), sampling(), step=0)
    with pytest.raises(ValueError, match="empty"):
        local.generate(prompt_table([[5], []]), sampling(), step=0)
    with pytest.raises(ValueError, match="same"):
        local.generate(pa.concat_tables([prompt_table([[5]])] * 2), sampling(), step=0)
    with pytest.raises(ValueError, match="safetensors"):
        local.update_weights("/no/such/folder", 9)
    assert local.health() == [{"weight_version": 5, "running": 0}]


@pytest.mark.parametrize("change, words", [
    ({"engine_kwargs": {"no_such_argument": 1}}, "no_such_argument"),
    ({"engine_kwargs": {"dtype": "float16"}}, "key of its own"),
    ({"max_num_batched_tokens": 128, "max_num_seqs": 8}, "seed"),
])
def test_a_start_that_cannot_be_is_refused(local, models, change, words):
    before = engine_processes(os.getpid())
    fleet = RolloutFleet(server_settings(models[0], **change), executor="local")
    with pytest.raises(ValueError, match=words):
        fleet.start()
    assert engine_processes(os.getpid()) == before
    with pytest.raises(RuntimeError, match="shut down"):  # start() ended what it had begun
        fleet.health()


def test_reload_from_dummy_equals_a_direct_load(local, remote, models):
    prompts = prompt_table(PROMPTS, n=4)
    direct = remote[0].generate(prompts, sampling(), step=11)
    local.update_weights(models[1], 6)
    try:
        reloaded = local.generate(prompts, sampling(), step=11)
    finally:
        local.update_weights(models[0], 5)
    assert set(reloaded["weight_version"].to_pylist()) == {6} and set(direct["weight_version"].to_pylist()) == {0}
    assert columns(reloaded)[0] == columns(direct)[0]
    # Batches differ (one engine against two that share), see the seeds' test.
    differences = np.abs(Trajectories(reloaded).flat("rollout_logprobs")[0]
                         - Trajectories(direct).flat("rollout_logprobs")[0])
    assert differences.max() < 1e-5
    assert columns(local.generate(prompts, sampling(), step=11))[0] != columns(direct)[0]


def test_update_drops_cached_prefixes(local, models):
    # Two whole cache blocks of 128 tokens: an entry of the old weights would be hit and shift the log-probs.
    prompt = np.random.default_rng(9).integers(3, VOCABULARY, 200).tolist()
    table = prompt_table([prompt], n=2)
    local.generate(table, sampling(ignore_eos=True), step=1)
    local.update_weights(models[1], 7)
    try:
        result = columns(local.generate(table, sampling(ignore_eos=True), step=1))
    finally:
        local.update_weights(models[0], 5)
    for ids, logprobs in zip(*result):
        assert np.abs(reference_logprobs(models[1], prompt, ids, 1.0) - np.array(logprobs)).max() < 1e-3


def test_sleep_says_that_the_cpu_has_none(local):
    assert local.sleep() is False and local.wake_weights() is False and local.wake_kv() is False
    assert len(local.generate(prompt_table(PROMPTS), sampling(), step=0)) == len(PROMPTS)


def test_weights_do_not_change_under_running_requests(local, models):
    prompts = prompt_table(PROMPTS, n=40)
    thread = threading.Thread(target=local.generate, args=(prompts, sampling(ignore_eos=True, max_tokens=100), 0))
    thread.start()
    wait_for(lambda: local.health()[0]["running"])
    with pytest.raises(RuntimeError, match="requests run"):
        local.update_weights(models[1], 8)
    thread.join()


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def engine_processes(pid: int) -> list[psutil.Process]:
    """vLLM's processes below `pid`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "HYBRIDRL_ENGINE" in process.environ():
                found.append(process)
        except psutil.Error:
            pass
    return found


def kill_while_it_generates(fleet, victim, prompts: pa.Table) -> pa.Table:
    """The batch's result when process `victim()` of replica 1 (or 0) is killed in the middle of it."""
    results = []
    settings = sampling(ignore_eos=True, max_tokens=100)
    thread = threading.Thread(target=lambda: results.append(fleet.generate(prompts, settings, 9)))
    thread.start()
    wait_for(lambda: fleet.health()[-1]["running"])
    os.kill(victim(), signal.SIGKILL)
    thread.join(timeout=120)
    return results[0]


def engine_core(pid: int) -> int:
    [core] = [process for process in engine_processes(pid) if "EngineCore" in process.cmdline()[0]]
    return core.pid


def test_a_replica_killed_in_the_middle_is_replaced(remote, models):
    """First an actor, then an engine: each time the batch is the undisturbed one, with the weights published last."""
    fleet, facts = remote
    prompts = prompt_table(PROMPTS, n=40)
    fleet.update_weights(models[0], 3)
    undisturbed = fleet.generate(prompts, sampling(ignore_eos=True, max_tokens=100), 9)
    actor = kill_while_it_generates(fleet, lambda: facts[1]["pid"], prompts)
    assert fleet.restarts == 1 and actor.equals(undisturbed)
    assert set(actor["weight_version"].to_pylist()) == {3}
    engine = kill_while_it_generates(fleet, lambda: engine_core(facts[0]["pid"]), prompts)
    assert fleet.restarts == 2 and engine.equals(undisturbed)
    keys = list(zip(engine["uid"].to_pylist(), engine["sample"].to_pylist()))
    assert keys == list(zip(prompts["uid"].to_pylist(), prompts["sample"].to_pylist())) and len(set(keys)) == 240
    assert [fact["weight_version"] for fact in fleet.health()] == [3, 3]


def test_a_dead_replica_is_named_and_leaves_nothing(remote):
    fleet, _ = remote
    fleet.restarts_a_step = 0
    facts = [{"pid": pid} for pid in actor_pids()]
    processes = [process for fact in facts for process in engine_processes(fact["pid"])]
    assert len([process for process in processes if "EngineCore" in process.cmdline()[0]]) == 2
    errors = []

    def generate():
        try:
            fleet.generate(prompt_table(PROMPTS, n=40), sampling(ignore_eos=True, max_tokens=100), step=0)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=generate)
    thread.start()
    wait_for(lambda: fleet.health()[1]["running"])
    os.kill(facts[1]["pid"], signal.SIGKILL)
    thread.join(timeout=60)
    assert errors and "rollout replica" in errors[0] and "replaced 0 times" in errors[0], errors
    with pytest.raises(RuntimeError, match="rollout replica . failed"):
        fleet.health()
    fleet.shutdown()
    actors = [psutil.Process(fact["pid"]) for fact in facts if psutil.pid_exists(fact["pid"])]
    _, alive = psutil.wait_procs(processes + actors, timeout=20)
    assert not alive


def actor_pids() -> list[int]:
    """The processes of this session's VllmServer actors."""
    everything = psutil.Process().children(recursive=True)
    return [process.pid for process in everything if process.cmdline()[:1] == ["ray::VllmServer"]]


def test_a_dead_engine_is_replaced_in_process(local):
    prompts = prompt_table(PROMPTS, n=4)
    before = local.generate(prompts, sampling(), step=6)
    os.kill(engine_core(os.getpid()), signal.SIGKILL)
    for _ in range(3):
        after = local.generate(prompts, sampling(), step=6)
    assert after.equals(before) and local.restarts == 1


def test_a_dead_engine_is_named_and_shutdown_leaves_nothing(local):
    local.restarts_a_step = 1
    os.kill(engine_core(os.getpid()), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"rollout replica \(local\) failed: EngineDead"):
        for _ in range(100):
            local.generate(prompt_table(PROMPTS), sampling(), step=0)
    local.shutdown()
    local.shutdown()
    assert not engine_processes(os.getpid())
    with pytest.raises(RuntimeError, match="shut down"):
        local.health()
