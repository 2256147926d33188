"""A step's samples through the passes of real ranks: columns in batch order, exact denominators, a ratio of 1."""

import dataclasses

import helpers
import numpy as np
import pytest
import torch

from hybridrl.algorithms.aggregation import Denominators
from hybridrl.trainer.batches import Pass, StepBatches

LENGTHS = [(5, 6), (9, 4), (3, 12), (7, 1), (2, 9), (11, 3), (4, 7), (6, 2)]
ROLES = {"actor": "policy", "ref": "policy", "critic": "value"}


def cost(lengths: np.ndarray) -> np.ndarray:
    return lengths + lengths.astype(float) ** 2 / 50


def pass_of(role: str = "actor", mini: int = 2, epochs: int = 1, tokens: int = 30, **changes) -> Pass:
    return Pass("actor", role, mini, epochs, tokens, "the.budget", **changes)


def pool_settings(folder: str, world: int, tp: int, pp: int, sp: bool, dtype: str, roles=("actor",), **optim):
    from hybridrl.trainer.worker import PoolSettings

    engines = {
        role: helpers.engine_settings(
            folder, ROLES[role], tp, pp, sp, dtype, total_steps=4, temperature=0.7,
            optim=None if role == "ref" else {"lr": 1e-3, **optim})
        for role in roles}
    return PoolSettings("cpu", world, tp, pp, 42, engines)


def actor_loss(**changes):
    from hybridrl.megatron.losses import ActorLoss

    return dataclasses.replace(
        ActorLoss("vanilla", "token-mean", 0.2, 0.2, 3.0, 0.001, False, 0.0, "kl", None), **changes)


# -- one rank, the whole way of a step -----------------------------------------------------------------------------


def start(batch, settings, epochs_scale=None):
    """StepBatches over a pool in this process."""
    from hybridrl.cluster.dispatch import WorkerGroup
    from hybridrl.cluster.local import LocalExecutor
    from hybridrl.trainer.worker import TrainWorker

    group = WorkerGroup(LocalExecutor(TrainWorker, settings), TrainWorker).start()
    return group, StepBatches(batch, {"actor": group}, 2, 3, cost, True, epochs_scale)


def through_the_passes(rank, world, init, folder: str) -> dict:
    batch = helpers.samples(LENGTHS)
    group, step = start(batch, pool_settings(folder, 1, 1, 1, False, "float32", tuple(ROLES)))
    one_by_one = group.executor.worker
    found = {"columns": []}
    shuffled = pass_of(epochs=2, shuffle_seed=5)
    for p, output, column in ((shuffled, "logprobs", "old_logprobs"), (pass_of("critic", mini=4), "values", "values"),
                              (pass_of("ref", mini=1, tokens=40), "logprobs", "ref_logprobs")):
        step.compute(p, {column: output})
        found["columns"].append((column, step.batch.flat(column)[0], alone(one_by_one.engines[p.role], batch, output)))
    kept = one_by_one.steps[shuffled.share_name].packs[1][0][0].columns
    found["held"] = sorted(kept)
    loss = actor_loss(use_kl_loss=True, kl_loss_coef=0.1)
    found["metrics"], found["own"] = step.update(shuffled, loss, ["old_logprobs", "advantages", "ref_logprobs"])
    found["shares"] = sorted(one_by_one.steps)
    step.release()
    found["released"] = dict(one_by_one.steps)
    group.shutdown()
    return found


def alone(engine, batch, output: str) -> np.ndarray:
    """Every sample in a pack of its own, in the order of the batch."""
    from hybridrl.data.packed import pack
    from hybridrl.megatron.losses import collect

    packs = [pack(batch.take([i])) for i in range(len(batch))]
    return torch.cat([part[output] for part in engine.run(packs, collect, train=False)]).numpy()


@pytest.fixture(scope="module")
def passed(models):
    return helpers.run_ranks(through_the_passes, 1, models["tied"])[0]


def test_columns_come_back_in_the_order_of_the_batch(passed):
    for column, flat, expected in passed["columns"]:
        assert flat.dtype == np.float32 and len(flat) == sum(n for _, n in LENGTHS)
        np.testing.assert_allclose(flat, expected, atol=2e-5, err_msg=column)
        assert column == "values" or np.unique(flat).size > 40, "a wrong order would show"


def test_columns_stay_on_the_rank_and_go_when_released(passed):
    assert "old_logprobs" in passed["held"] and passed["released"] == {}
    assert len(passed["shares"]) == 3, "one packing a way of cutting"


def test_update_reports_means_over_its_steps(passed):
    metrics = passed["metrics"]
    assert {"actor/pg_loss", "actor/entropy", "actor/kl_loss", "actor/ppo_kl", "grad_norm", "lr"} <= metrics.keys()
    assert metrics["grad_norm"] > 0 and metrics["lr"] == 1e-3 and metrics["skipped_steps"] == 0
    old = next(flat for column, flat, _ in passed["columns"] if column == "old_logprobs")
    assert not np.array_equal(passed["own"], old), "later mini-batches run on updated weights"
    assert np.abs(passed["own"] - old).max() < 2


# -- denominators --------------------------------------------------------------------------------------------------


class Group:
    """Only its number of data-parallel ranks is asked."""

    def __init__(self, dp: int):
        self.dp = dp

    def load_share(self, *args) -> None:
        pass


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("seed", [None, 3])
def test_denominators_are_the_whole_mini_batchs(dp, seed):
    batch = helpers.samples(LENGTHS * 4, seed=2)
    mask, offsets = batch.flat("response_mask")
    mask = mask.copy()
    mask[offsets[4] : offsets[5]] = 0  # a sequence in which nothing counts
    from hybridrl.data.trajectories import jagged

    batch = batch.with_columns(response_mask=jagged(mask, offsets))
    step = StepBatches(batch, {"actor": Group(dp)}, 2, 1, cost, True, 40.0)
    p = pass_of(mini=4, epochs=2, shuffle_seed=seed)
    shares = step.load(p)
    found = step._denominators(shares)
    assert [len(epoch) for epoch in found] == [4, 4]
    for epoch in range(2):
        for mini, denom in enumerate(found[epoch]):
            rows = sorted(s.rows[i] for s in shares for micro in s.epochs[epoch][mini] for i in micro)
            part = batch.take(rows)
            values, cu = part.flat("response_mask")
            assert denom == Denominators.of(torch.tensor(values), torch.tensor(cu), 40.0)
    assert sum(d.tokens for d in found[0]) == mask.sum()
    assert sum(d.sequences for d in found[0]) == sum(
        mask[a:b].any() for a, b in zip(offsets, offsets[1:], strict=False))


# -- ratio 1, bit for bit ------------------------------------------------------------------------------------------

SPLITS = {"one": (1, 1, 1, False), "tp-sp": (2, 2, 1, True), "pp": (2, 1, 2, False), "dp": (2, 1, 1, False)}


def on_policy(rank, world, init, folder: str, tp: int, pp: int, sp: bool) -> dict:
    """Old log-probs and those of the first mini-batch's own forward, as the driver would drive the ranks."""
    from hybridrl.data.batching import by_tokens, plan_shares
    from hybridrl.trainer.worker import TrainWorker

    found = {}
    batch = helpers.samples(LENGTHS)
    lengths = batch.lengths("prompt_ids") + batch.lengths("response_ids")
    for dtype in ("float32", "bfloat16"):
        if not found:
            worker = TrainWorker(rank, pool_settings(folder, world, tp, pp, sp, dtype))
            coords = worker.setup(init)
        else:  # the groups are one a process
            from hybridrl.megatron.engine import Engine

            settings = pool_settings(folder, world, tp, pp, sp, dtype).engines["actor"]
            worker.engines = {"actor": Engine(settings, coords, worker.device)}
        shares = plan_shares(lengths, 2, 2, 2, coords.dp, cost, by_tokens(30, "the.budget"))
        share = shares[coords.dp_rank]
        worker.load_share("s", (share, batch.take(share.rows)))
        old = worker.compute("s", "actor", {"old_logprobs": "logprobs"})["old_logprobs"]
        again = worker.compute("s", "actor", {"old_logprobs": "logprobs"})["old_logprobs"]
        values, offsets = batch.take(share.rows).flat("advantages")
        worker.attach("s", {"advantages": (values, offsets)})
        denoms = [[Denominators(20.0, 4.0)] * 2] * 2
        result = worker.update("s", "actor", actor_loss(), denoms)
        first = np.concatenate([np.arange(offsets[r], offsets[r + 1]) for m in share.epochs[0][0] for r in m])
        found[dtype] = old, again, result["logprobs"], first, result["metrics"], coords.is_collector
        worker.drop_shares()
    worker.close()
    return found


@pytest.mark.parametrize("split", list(SPLITS))
def test_ratio_is_exactly_one_on_the_first_mini_batch(models, split):
    world, tp, pp, sp = SPLITS[split]
    ranks = helpers.run_ranks(on_policy, world, models["untied"], tp, pp, sp)
    assert any(r["float32"][-1] for r in ranks)
    for result in ranks:
        for old, again, own, first, metrics, collects in result.values():
            if not collects and pp > 1:
                assert not old.any() and not own.any(), "the first stage has none"
                continue
            assert np.array_equal(old, again) and 0 < len(first) < len(old)
            assert np.array_equal(own[first], old[first])
            assert metrics["actor/ppo_kl"][0] == 0.0 and metrics["actor/pg_clipfrac"][0] == 0.0
            assert metrics["actor/ppo_kl"][2] != 0.0, "the second epoch is off-policy"
            assert len(metrics["grad_norm"]) == 4


def test_pass_names_what_can_be_shared():
    base = pass_of(mini=4, epochs=2, tokens=100, shuffle_seed=1)
    assert base.share_name == dataclasses.replace(base, role="ref").share_name
    for change in ({"mini_batch_prompts": 2}, {"epochs": 1}, {"max_tokens": 99}, {"micro_batch_size": 3},
                   {"shuffle_seed": None}):
        assert dataclasses.replace(base, **change).share_name != base.share_name, change
