"""vLLM takes what the trainer exports of the other families, and both give a response the same log-probs."""

import os

import helpers
import numpy as np
import pyarrow as pa
import pytest
from rollout_helpers import prompt_table, sampling, server_settings

from hybridrl.data.trajectories import Trajectories, jagged
from hybridrl.rollout.fleet import RolloutFleet

PROMPTS = [np.random.default_rng(i).integers(3, helpers.VOCABULARY, n).tolist() for i, n in enumerate((3, 17, 60))]


def export(rank, world, init, folder: str, out: str) -> None:
    from hybridrl.megatron.engine import Engine

    coords, device = helpers.join(rank, world, init)
    os.makedirs(out)
    Engine(helpers.engine_settings(folder), coords, device).export_hf(out)


def logprobs(rank, world, init, folder: str, prompts: list, responses: list) -> np.ndarray:
    from hybridrl.data.packed import pack
    from hybridrl.megatron.engine import Engine
    from hybridrl.megatron.losses import collect

    coords, device = helpers.join(rank, world, init)
    engine, ids = Engine(helpers.engine_settings(folder), coords, device), pa.list_(pa.int32())
    table = Trajectories(pa.table({"prompt_ids": pa.array(prompts, ids), "response_ids": pa.array(responses, ids)}))
    offsets = table.flat("response_ids")[1]
    table = table.with_columns(response_mask=jagged(np.ones(offsets[-1], np.int8), offsets))
    return engine.run([pack(table)], collect, train=False)[0]["logprobs"].numpy()


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_exported_family_in_vllm(tmp_path, family):
    source = helpers.save_model(tmp_path / "source", False, family=family, head_dim=32)
    exported = str(tmp_path / "exported")
    helpers.run_ranks(export, 1, source, exported)
    fleet = RolloutFleet(server_settings(exported, enforce_eager=True), executor="local")
    try:
        fleet.start()
        table = fleet.generate(prompt_table(PROMPTS, n=2), sampling(ignore_eos=True), step=1)
    finally:
        fleet.shutdown()
    responses = table["response_ids"].to_pylist()
    assert [len(r) for r in responses] == [24] * 6
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    trainer = helpers.run_ranks(logprobs, 1, exported, prompts, responses)[0]
    assert np.abs(trainer - Trajectories(table).flat("rollout_logprobs")[0]).max() < 1e-3
