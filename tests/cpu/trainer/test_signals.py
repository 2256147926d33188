"""On the driver, with recording stand-ins for ranks, fleet and rewards: the refill's limits, and a rejected sample that
reaches neither baseline nor denominator nor rank."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from liveness import Fleet, Pool, Rewards

from hybridrl.algorithms.correction import Correction
from hybridrl.data.trajectories import Trajectories, jagged
from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.telemetry.phases import PhaseTimer
from hybridrl.trainer import signals
from hybridrl.trainer.batches import Pass, StepBatches
from hybridrl.trainer.generation import Generation, GenerationSettings, GroupFilter, Overlong

SAMPLING = SamplingSettings(temperature=1.0, top_p=0.9, top_k=-1, max_tokens=8, seed=0)


class Loader:
    """Four prompts a batch, two batches an epoch."""

    steps_per_epoch = 2

    def __init__(self):
        table = pa.table({
            "prompt_ids": [[5, 6]] * 4, "data_source": ["arithmetic"] * 4, "ground_truth": ["1"] * 4,
            "extra_info": ["{}"] * 4,
        })  # fmt: skip
        self.dataset = SimpleNamespace(table=table)

    def next(self):
        return self.dataset.table, 0


class Scores(Rewards):
    """The same score for all of the first `dull` batches, then liveness' own."""

    def __init__(self, dull: int):
        super().__init__([])
        self.dull = dull

    def score(self, *columns):
        found = super().score(*columns)
        if self.dull > 0:
            found.scores[:] = 1.0
        self.dull -= 1
        return found


def generation(dull: int, limit: int = 0, metric: str = "score", **changes) -> Generation:
    made = GenerationSettings(2, 4, SAMPLING, group_filter=GroupFilter(metric, limit), **changes)
    tokenizer = SimpleNamespace(batch_decode=lambda ids, **kwargs: [""] * len(ids))
    return Generation(made, Loader(), Fleet([]), tokenizer, Scores(dull), PhaseTimer())


def test_refill_goes_on_until_there_are_enough():
    batch, found = generation(dull=2, limit=3, overlong=Overlong(8, 7, 1.0)).step(9)
    assert batch.table["uid"].to_pylist() == [f"9-{i}" for i in (8, 8, 9, 9, 10, 10, 11, 11)]
    assert found["training/num_gen_batches"] == 3 and found["training/filter_groups/evicted_samples"] == 16
    assert found["training/filter_groups/discarded_surplus_samples"] == 0
    # the penalty makes equal scores of different lengths differ; metric=score looks below it
    assert (batch.scalars("overlong_reward") < 0).any()


def test_surplus_is_dropped():
    batch, found = generation(dull=0, metric="acc").step(1)  # half of the groups differ in acc
    assert len(batch) == 8 and found["training/num_gen_batches"] == 2
    assert found["training/filter_groups/evicted_samples"] == 8


@pytest.mark.parametrize(
    "dull, limit, metric, says",
    [
        (5, 2, "score", "max_num_gen_batches=2: after so many batches there are 0 of 4 prompts"),
        (99, 0, "score", "a whole epoch without a prompt whose samples differ"),
        (0, 0, "accuracy", "filter_groups.metric=accuracy: the reward function returns no number of that name"),
    ],
)
def test_refill_ends_with_a_message(dull, limit, metric, says):
    with pytest.raises(ValueError, match=says):
        generation(dull, limit, metric).step(1)


def test_what_is_rejected_reaches_nothing():
    """Four samples of one prompt; the last one's log-probs are far off and take the whole sample out."""
    lengths, offsets = [2, 3, 1, 2], np.array([0, 2, 5, 6, 8])
    old = np.full(8, -0.5, np.float32)
    rollout = old.copy()
    rollout[6] = -3.0
    batch = Trajectories(pa.table({
        "uid": ["1-0"] * 4, "sample": list(range(4)), "prompt_ids": [[1]] * 4,
        "response_ids": [[7] * n for n in lengths],
    })).with_columns(
        response_mask=jagged(np.ones(8, np.int8), offsets), old_logprobs=jagged(old, offsets),
        rollout_logprobs=jagged(rollout, offsets), score=np.array([1.0, 0.0, 2.0, 90.0], np.float32),
    )  # fmt: skip
    log: list = []
    pool = Pool("actor", log)
    pool.update = lambda name, role, loss, denominators: log.append(denominators) or [
        {"metrics": {}, "logprobs": np.zeros(sum(t.lengths("response_ids")), np.float32)} for t in pool.held[name]
    ]
    work = StepBatches(batch, {"actor": pool}, 4, 1, lambda lengths: lengths, True, None)
    p = Pass("actor", "actor", 1, 1, 64, "budget")
    work.load(p)
    found = signals.correct_rollouts(work, Correction("token", "2.0", False, "seq_max_k2", "1.0"))
    assert found["rollout_corr/rollout_rs_masked_fraction"] == 0.25
    options = {"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": False}
    signals.estimate(work, {"name": "grpo", "options": options, "reward_keys": []}, None, None)
    assert work.batch.flat("advantages")[0].tolist() == [0.0, 0.0, -1.0, -1.0, -1.0, 1.0, 0.0, 0.0]
    work.update(p, None, ["advantages", "rollout_is_weights"])
    attached = next(entry[3] for entry in log if entry[1] == "attach")
    masks = [value for rank in attached for value in rank["response_mask"]]
    assert sorted(masks) == [0, 0, 1, 1, 1, 1, 1, 1]
    ((denominator,),) = log[-1]
    assert (denominator.tokens, denominator.sequences) == (6.0, 3.0)
