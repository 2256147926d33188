"""Estimator x loss aggregation x split: equal loss and gradient, through the trainer's own batches and workers.

Nine samples of three prompts, ragged, with tool tokens that are masked; the last four have no valid token at all, and
with two data-parallel ranks they are all that the second one gets.
"""

import functools
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch

ESTIMATORS = ("gae", "grpo", "rloo", "reinforce_plus_plus")
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
SPLITS = {  # world, tp, pp, sequence parallelism, virtual stages, samples of a micro-batch
    "three-micros": (1, 1, 1, False, None, 3),
    "dp": (2, 1, 1, False, None, 2),
    "tp": (2, 2, 1, False, None, 4),
    "tp-sp": (2, 2, 1, True, None, 4),
    "pp": (2, 1, 2, False, None, 3),
    "pp-virtual": (2, 1, 2, False, 2, 3),
}
ONE = (1, 1, 1, False, None, 9)
LENGTHS = [(5, 9), (5, 4), (5, 12), (7, 1), (7, 9), (7, 3), (2, 7), (2, 2), (2, 5)]
SCALE = 12.0


class Everyone:
    """An executor in which each rank runs its own part, and all learn all results."""

    def __init__(self, rank: int, world: int, worker):
        self.rank, self.world, self.worker = rank, world, worker

    def put(self, value):
        return value

    def run(self, rank: int, name: str, *args):
        return getattr(self.worker, name)(*args) if rank == self.rank else None

    def wait(self, pending: list) -> list:
        found = [None] * self.world
        torch.distributed.all_gather_object(found, pending[self.rank])
        return found


def trajectories():
    """With token rewards to come from `score`, and everything else that the losses take."""
    from hybridrl.data.trajectories import jagged

    table, random = helpers.samples(LENGTHS, seed=3), np.random.default_rng(5)
    mask, offsets = (part.copy() for part in table.flat("response_mask"))
    mask[2:5] = 0  # a tool's answer
    mask[offsets[2]], mask[offsets[3]] = 1, 1
    mask[offsets[5]:] = 0
    columns = {"uid": [f"p{i // 3}" for i in range(9)], "score": random.standard_normal(9).astype(np.float32)}
    return table.with_columns(response_mask=jagged(mask, offsets), **columns)


def with_advantages(estimator: str):
    """The trajectories with the advantages and returns that the trainer gives them."""
    from hybridrl.config import PPOConfig
    from hybridrl.configuration import Machine, load, resolve
    from hybridrl.trainer import settings, signals

    words = ["data.train_files=x", "actor_rollout_ref.model.path=x", f"algorithm.adv_estimator={estimator}",
             "algorithm.gamma=0.97", "algorithm.lam=0.9", "actor_rollout_ref.rollout.n=3", "trainer.n_gpus_per_node=1"]
    config, _ = load(PPOConfig, words, "ppo")
    batch = trajectories()
    work = SimpleNamespace(batch=batch, offsets=batch.flat("response_mask")[1])
    signals.estimate(work, settings.advantages(resolve(config, Machine("cpu", 0, 2, 16.0))), None, None)
    return work.batch


def losses_of(mode: str) -> dict:
    from hybridrl.megatron.losses import ActorLoss, CriticLoss

    return {"actor": ActorLoss("vanilla", mode, 0.2, 0.28, 3.0, 0.01, True, 0.05, "low_var_kl", SCALE),
            "critic": CriticLoss(0.2, mode, SCALE)}


def measure(rank, world, init, folders: dict, tp: int, pp: int, sp: bool, virtual, micro: int) -> dict:
    from hybridrl.cluster.dispatch import WorkerGroup
    from hybridrl.trainer.batches import Pass, StepBatches
    from hybridrl.trainer.worker import PoolSettings, TrainWorker

    def engine(role: str, kind: str):
        return helpers.engine_settings(folders[role], kind, tp, pp, sp, distributed=False, virtual=virtual,
                                       optim={"lr": 0.0, "clip_grad": 0.0})

    settings = PoolSettings("cpu", world, tp, pp, 42,
                            {"actor": engine("actor", "policy"), "critic": engine("critic", "value")})
    worker = TrainWorker(rank, settings)
    group = WorkerGroup(Everyone(rank, world, worker), TrainWorker)
    group.coords = group.submit("setup", init)()
    critic = worker.engines["critic"]
    if critic.last:  # zero at the start, and then no gradient would pass it
        critic.module.value_head.weight.data = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    found: dict = {"coords": worker.coords}
    for estimator in ESTIMATORS:
        work = StepBatches(with_advantages(estimator), {"actor": group}, 3, 1, lambda n: n, False, SCALE)
        for role in ("actor", "critic") if estimator == "gae" else ("actor",):
            p = Pass("actor", role, 3, 1, 0, "", micro_batch_size=micro)
            columns = ["values", "returns"] if role == "critic" else ["old_logprobs", "ref_logprobs", "advantages"]
            for mode in MODES:
                metrics, _ = work.update(p, losses_of(mode)[role], columns)
                found[estimator, mode, role] = metrics, helpers.shards_of(worker.engines[role], lambda q: q.main_grad)
        found["rows"] = [len(share.rows) for share in work.shares["actor", p.share_name]]
        work.release()
    return found


CASES = [(e, m, r) for e in ESTIMATORS for m in MODES for r in (("actor", "critic") if e == "gae" else ("actor",))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    small = dict(layers=4, hidden_size=64, intermediate_size=96, head_dim=32)
    make = tmp_path_factory.mktemp
    return {"actor": helpers.save_model(make("actor"), True, family="qwen3", **small),
            "critic": helpers.save_model(make("critic"), False, family="llama3", **small)}


@pytest.fixture(scope="module")
def measured(folders):
    @functools.cache
    def get(split: str) -> list[dict]:
        world, *how = ONE if split == "one" else SPLITS[split]
        return helpers.run_ranks(measure, world, folders, *how)

    return get


@pytest.fixture(scope="module")
def dims(folders):
    from hybridrl.megatron.config_from_hf import layout_dims, read_hf_config

    return layout_dims(read_hf_config(folders["actor"]), 2)


@pytest.mark.parametrize("split", list(SPLITS))
def test_split_changes_neither_loss_nor_gradient(measured, dims, split):
    one, ranks = measured("one"), measured(split)
    for case in CASES:
        expected, found = one[0][case][0], ranks[0][case][0]
        for name in expected:
            tolerance = 1e-5 if name == "grad_norm" else 1e-6
            assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=1e-6), (case, name)
        whole = helpers.whole_tensors(one, lambda r, case=case: r[case][1], dims)
        helpers.close(helpers.whole_tensors(ranks, lambda r, case=case: r[case][1], dims), whole, 1e-5)


def test_cases_differ_and_ranks_are_uneven(measured):
    """Equal numbers everywhere would make the comparison above worthless."""
    one = measured("one")[0]
    losses = {case: one[case][0]["critic/loss" if case[2] == "critic" else "actor/loss"] for case in CASES}
    assert len({round(value, 5) for value in losses.values()}) == len(losses)
    assert measured("dp")[0]["rows"] == [5, 4]
    mask, offsets = trajectories().flat("response_mask")
    assert mask[: offsets[5]].any() and not mask[offsets[5]:].any()
