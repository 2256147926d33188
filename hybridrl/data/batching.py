"""How a step's samples are cut: mini-batches, data-parallel shares, micro-batches, once a step.

Every pass over the samples (old log-probs, reference, values, updates) uses the same packs. That makes the first
update's ratio exactly 1 and packs each sample once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hybridrl.data.balance import karmarkar_karp, micro_batches

Micro = list[int]  # rows of one pack


@dataclass(frozen=True)
class Share:
    """What one data-parallel rank gets: `rows` of the step's batch, and per epoch and mini-batch the micro-batches as
    indices into `rows`."""

    rows: list[int]
    epochs: list[list[list[Micro]]]


def plan_shares(
    lengths: Sequence[int],
    group: int,
    mini_batch: int,
    epochs: int,
    dp: int,
    cost: Callable[[np.ndarray], np.ndarray],
    split: Callable[[list[int]], list[list[int]]],
    balance: bool = True,
    shuffle_seed: Sequence[int] | None = None,
) -> list[Share]:
    """One Share a data-parallel rank.

    lengths [N] tokens of each sample, in prompt order; `group` samples a prompt; `mini_batch` prompts of an optimizer
    step; cost maps lengths to work; split cuts the lengths of one rank's mini-batch into micro-batches. Without
    shuffle_seed each epoch has the same mini-batches in the order of the prompts; with it each epoch has its own.
    """
    lengths = np.asarray(lengths)
    prompts = len(lengths) // group
    assert prompts * group == len(lengths) and prompts % mini_batch == 0
    plans: list[list[list[list[int]]]] = []  # [epoch][mini][rank] -> rows
    for epoch in range(epochs):
        order = np.arange(prompts)
        if shuffle_seed is not None:
            order = np.random.default_rng([*shuffle_seed, epoch]).permutation(prompts)
        minis = []
        for start in range(0, prompts, mini_batch):
            chosen = np.sort(order[start : start + mini_batch])
            rows = (chosen[:, None] * group + np.arange(group)).reshape(-1)
            minis.append(_over_ranks(rows, lengths[rows], dp, cost, balance))
        plans.append(minis)
    return [_share(plans, rank, lengths, split) for rank in range(dp)]


def _over_ranks(rows: np.ndarray, lengths: np.ndarray, dp: int, cost: Callable, balance: bool) -> list[list[int]]:
    if dp == 1:
        return [rows.tolist()]
    if balance:
        bins = karmarkar_karp(cost(lengths), dp)
        return [rows[np.sort(items)].tolist() for items in bins]
    return [part.tolist() for part in np.array_split(rows, dp)]


def _share(plans: list, rank: int, lengths: np.ndarray, split: Callable) -> Share:
    rows = sorted({row for minis in plans for ranks in minis for row in ranks[rank]})
    place = {row: i for i, row in enumerate(rows)}
    epochs = []
    for minis in plans:
        epochs.append([])
        for ranks in minis:
            mine = ranks[rank]
            assert mine, "configuration.check keeps a sample for each rank in each mini-batch"
            micros = split([int(lengths[row]) for row in mine])
            epochs[-1].append([[place[mine[i]] for i in micro] for micro in micros])
    return Share(rows, epochs)


def by_tokens(max_tokens: int, key: str) -> Callable[[list[int]], list[list[int]]]:
    """Micro-batches within a token budget (use_dynamic_bsz)."""
    return lambda lengths: micro_batches(lengths, max_tokens, key=key)


def by_count(samples: int) -> Callable[[list[int]], list[list[int]]]:
    """Micro-batches of a fixed number of samples (ppo_micro_batch_size_per_gpu)."""
    return lambda lengths: [list(range(a, min(a + samples, len(lengths)))) for a in range(0, len(lengths), samples)]
