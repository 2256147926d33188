"""A step's samples: prompts drawn, answered and scored, until there are as many as the step trains on.

With a group filter (DAPO's dynamic sampling) prompts whose samples all score alike are dropped and more are generated;
with an over-long penalty long answers score less; with greedy settings each prompt is answered once more, greedily, for
a baseline (ReMax).
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from hybridrl.algorithms import dapo
from hybridrl.data.prompts import PromptLoader
from hybridrl.data.trajectories import Trajectories
from hybridrl.rewards.manager import RewardManager
from hybridrl.rollout.fleet import RolloutFleet
from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.telemetry.phases import PhaseTimer
from hybridrl.trainer.samples import join, repeat, score

FILTER = "algorithm.filter_groups"


@dataclass(frozen=True)
class Overlong:
    """The penalty grows from 0 to factor over the last `buffer` tokens before max_length."""

    max_length: int
    buffer: int
    factor: float


@dataclass(frozen=True)
class GroupFilter:
    """metric: a column that must differ within a group; max_batches: of prompts, generated for a step (0: any)."""

    metric: str
    max_batches: int


@dataclass(frozen=True)
class GenerationSettings:
    """n samples of each of `prompts` prompts."""

    n: int
    prompts: int
    sampling: SamplingSettings
    greedy: SamplingSettings | None = None
    overlong: Overlong | None = None
    group_filter: GroupFilter | None = None


class Generation:
    """Makes the samples of a step. Prompts left over by the group filter are not kept for the next step: they would be
    off-policy there."""

    def __init__(
        self,
        settings: GenerationSettings,
        loader: PromptLoader,
        fleet: RolloutFleet,
        tokenizer,
        rewards: RewardManager,
        timer: PhaseTimer,
    ):
        self.settings, self.loader, self.fleet = settings, loader, fleet
        self.tokenizer, self.rewards, self.timer = tokenizer, rewards, timer

    def step(self, step: int) -> tuple[Trajectories, dict[str, float]]:
        """Scored samples, n in a row of each prompt, and metrics. ValueError: the filter found too few prompts."""
        wanted, parts, found = self.settings.prompts * self.settings.n, [], Counter()
        drawn = dropped = barren = 0
        while sum(map(len, parts)) < wanted:
            self._check(drawn // self.settings.prompts, barren, sum(map(len, parts)) // self.settings.n)
            prompts, epoch = self.loader.next()
            batch, numbers = self._answers(prompts, [f"{step}-{drawn + i}" for i in range(prompts.num_rows)], step)
            found.update(numbers)
            drawn += prompts.num_rows
            kept = self._informative(batch)
            dropped += len(batch) - len(kept)
            barren = 0 if len(kept) else barren + 1
            parts.append(kept)
        batch = _concat([part for part in parts if len(part)])
        metrics = dict(found) | {"training/epoch": epoch}
        if self.settings.group_filter:
            metrics |= {
                "training/num_gen_batches": float(drawn // self.settings.prompts),
                "training/filter_groups/evicted_samples": float(dropped),
                "training/filter_groups/discarded_surplus_samples": float(len(batch) - wanted),
            }
            batch = batch.take(range(wanted))
        if self.settings.overlong:
            penalties = batch.scalars("overlong_reward")
            metrics["reward/overlong_penalty"] = float(penalties.mean())
            metrics["reward/overlong_ratio"] = float((penalties < 0).mean())
        return (self._with_baselines(batch, step) if self.settings.greedy else batch), metrics

    def _answers(self, prompts, uids: list[str], step: int) -> tuple[Trajectories, dict[str, float]]:
        with self.timer("gen"):
            requests = repeat(prompts, uids, self.settings.n)
            responses = self.fleet.generate(requests, self.settings.sampling, step)
        return self.scored(join(requests, responses))

    def scored(self, batch: Trajectories) -> tuple[Trajectories, dict[str, float]]:
        """The samples with their scores, the over-long penalty taken off, and the reward processes' metrics."""
        with self.timer("reward"):
            batch, numbers = score(batch, self.tokenizer, self.rewards)
        if over := self.settings.overlong:
            penalty = dapo.overlong_penalty(batch.lengths("response_ids"), over.max_length, over.buffer, over.factor)
            raw = batch.scalars("score")
            batch = batch.with_columns(overlong_reward=penalty, raw_score=raw, score=raw + penalty)
        return batch, numbers

    def _informative(self, batch: Trajectories) -> Trajectories:
        if not self.settings.group_filter:
            return batch
        metric = self.settings.group_filter.metric
        raw = "raw_score" if self.settings.overlong else "score"
        column = {"score": raw, "seq_reward": "score", "seq_final_reward": "score"}.get(metric, metric)
        if column not in batch:
            raise ValueError(
                f"{FILTER}.metric={metric}: the reward function returns no number of that name beside score; name one"
                " that it does, or seq_final_reward"
            )
        kept = dapo.informative(batch.scalars(column), batch.scalars("uid").astype(str))
        return batch.take(np.flatnonzero(kept))

    def _check(self, batches: int, barren: int, kept: int) -> None:
        if not self.settings.group_filter:
            return
        limit = self.settings.group_filter.max_batches
        metric = f"{FILTER}.metric={self.settings.group_filter.metric}"
        have = f"{kept} of {self.settings.prompts} prompts whose samples differ in {metric}"
        if limit and batches >= limit:
            raise ValueError(
                f"{FILTER}.max_num_gen_batches={limit}: after so many batches there are {have}. Raise it (0: no limit),"
                " or choose prompts that are neither too easy nor too hard"
            )
        if barren > self.loader.steps_per_epoch:
            raise ValueError(
                f"{FILTER}: a whole epoch without a prompt whose samples differ (so far {have}). Choose prompts that"
                " are neither too easy nor too hard, raise actor_rollout_ref.rollout.n, or switch the filter off"
            )

    def _with_baselines(self, batch: Trajectories, step: int) -> Trajectories:
        """The score of each prompt's greedy answer at all its samples, as reward_baseline."""
        n = self.settings.n
        first = batch.take(range(0, len(batch), n)).table
        requests = first.select([*self.loader.dataset.table.column_names, "uid", "sample"])
        with self.timer("gen_max"):
            responses = self.fleet.generate(requests, self.settings.greedy, step)
        greedy, _ = self.scored(join(requests, responses))
        return batch.with_columns(reward_baseline=np.repeat(greedy.scalars("score").astype(np.float32), n))


def _concat(parts: list[Trajectories]) -> Trajectories:
    """All rows; a number that the reward function returned in some batches only is NaN in the others."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    filled = [
        part.with_columns(**{c: np.full(len(part), np.nan, np.float32) for c in names if c not in part})
        for part in parts
    ]
    return Trajectories.concat(filled) if len(filled) > 1 else filled[0]
