"""Two stages of two chunks: steps equal one rank's, checkpoints come back bit for bit, refusals have names."""

import os

import helpers
import pytest
import torch

LENGTHS = [(5, 6), (9, 4), (3, 12), (7, 1), (2, 9)]
MICROS = [[0, 1], [2, 3], [4]]  # three, where the interleaved schedule wants a multiple of two


def learn(engine, step: int) -> dict[str, float]:
    from hybridrl.data.packed import pack

    table = helpers.samples(LENGTHS, seed=step)
    packs = [pack(table.take(rows), helpers.LOSS_COLUMNS, pad_multiple=engine.coords.tp) for rows in MICROS]

    def loss(out, pack):
        value = -(out["logprobs"] * pack.columns["advantages"]).sum() / 23
        return value, {"loss": value.detach()}

    parts = engine.run(packs, loss, train=True)
    assert len(parts) == (len(MICROS) if engine.last else 0)
    return engine.step() | {"loss": sum(float(part["loss"]) for part in parts)}


def train(rank, world, init, folder: str, out: str, tp: int, pp: int, virtual: int | None, distributed: bool) -> dict:
    from hybridrl.megatron import checkpoint
    from hybridrl.megatron.engine import Engine

    coords, device = helpers.join(rank, world, init, tp, pp)

    def fresh():
        return Engine(helpers.engine_settings(
            folder, tp=tp, pp=pp, virtual=virtual, distributed=distributed, optim={"lr": 1e-3, "clip_grad": 0.5},
            total_steps=4), coords, device)

    engine = fresh()
    found = {"coords": coords, "stats": [learn(engine, 0)]}
    checkpoint.save_rank(engine, out)
    found["stats"].append(learn(engine, 1))
    found["stepped"] = helpers.shards_of(engine, lambda p: p.data)
    resumed = fresh()
    checkpoint.load_rank(resumed, out)
    again = learn(resumed, 1)
    found["resumed"] = again == found["stats"][1] and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(engine.named_parameters(), resumed.named_parameters(), strict=True))
    found["names"] = len({name for name, _ in engine.named_parameters()})
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_steps_and_checkpoints(tmp_path, tied):
    from hybridrl.megatron.config_from_hf import layout_dims, read_hf_config

    folder = helpers.save_model(tmp_path / "model", tied, 4)
    one = helpers.run_ranks(train, 1, folder, os.path.join(tmp_path, "one"), 1, 1, None, False)
    ranks = helpers.run_ranks(train, 2, folder, os.path.join(tmp_path, "two"), 1, 2, 2, tied)
    dims = layout_dims(read_hf_config(folder), 1)
    for step in range(2):
        assert ranks[1]["stats"][step]["loss"] == pytest.approx(one[0]["stats"][step]["loss"], rel=1e-5)
        for rank in ranks:
            assert rank["stats"][step]["grad_norm"] == pytest.approx(one[0]["stats"][step]["grad_norm"], rel=1e-5)
    helpers.close(helpers.whole_tensors(ranks, lambda r: r["stepped"], dims),
                  helpers.whole_tensors(one, lambda r: r["stepped"], dims), 1e-5)
    assert all(rank["resumed"] for rank in ranks)
    assert ranks[0]["names"] == len(ranks[0]["stepped"])


def refused(rank, world, init, folder: str) -> str:
    from hybridrl.megatron.engine import Engine

    coords, device = helpers.join(rank, world, init, 1, 2)
    with pytest.raises(ValueError) as caught:
        Engine(helpers.engine_settings(folder, pp=2, virtual=2), coords, device)
    return str(caught.value)


def test_layers_that_do_not_divide_are_refused(models):
    for words in helpers.run_ranks(refused, 2, models["tied"]):
        assert "virtual_pipeline_model_parallel_size" in words and "2" in words
