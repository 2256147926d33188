"""Plans of a step: each sample once an epoch, every rank in every mini-batch, budgets held, work balanced."""

import numpy as np
import pytest

from hybridrl.data.batching import by_count, by_tokens, plan_shares

KEY = "some.budget"


def quadratic(lengths: np.ndarray) -> np.ndarray:
    return lengths * 100.0 + lengths.astype(float) ** 2


def lengths_of(n: int, seed: int = 0, longest: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(2, longest + 1, n).tolist()


def plan(lengths, group=2, mini=4, epochs=1, dp=2, split=None, **options):
    return plan_shares(lengths, group, mini, epochs, dp, quadratic, split or by_tokens(100, KEY), **options)


def minis(shares, epoch: int) -> list[list[list[list[int]]]]:
    """[mini][rank] -> micro-batches, as rows of the step's batch."""
    return [[[[s.rows[i] for i in micro] for micro in s.epochs[epoch][m]] for s in shares]
            for m in range(len(shares[0].epochs[epoch]))]


def flat(nested) -> list[int]:
    return [row for part in nested for row in (flat(part) if isinstance(part, list) else [part])]


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
@pytest.mark.parametrize("epochs,seed", [(1, None), (3, None), (3, (7, 1))])
@pytest.mark.parametrize("balance", [True, False])
def test_each_sample_once_an_epoch(dp, epochs, seed, balance):
    lengths = lengths_of(2 * 12)
    shares = plan(lengths, epochs=epochs, dp=dp, balance=balance, shuffle_seed=seed)
    assert len(shares) == dp
    for share in shares:
        assert len(share.epochs) == epochs and share.rows == sorted(set(share.rows))
        assert {i for e in share.epochs for m in e for micro in m for i in micro} == set(range(len(share.rows)))
    for epoch in range(epochs):
        parts = minis(shares, epoch)
        assert len(parts) == 3 and sorted(flat(parts)) == list(range(24))
        for ranks in parts:
            assert len(flat(ranks)) == 8, "4 prompts of 2 samples"
            assert all(rank and all(rank) for rank in ranks), "each rank has samples in each mini-batch"
            rows = flat(ranks)
            assert sorted(r ^ 1 for r in rows) == sorted(rows), "a prompt's samples are in one mini-batch"


def test_without_shuffling_mini_batches_follow_the_prompts():
    parts = minis(plan(lengths_of(24), epochs=2), 1)
    assert [sorted(flat(ranks)) for ranks in parts] == [list(range(a, a + 8)) for a in (0, 8, 16)]


def test_shuffling_changes_with_epoch_and_seed_and_repeats():
    lengths = lengths_of(64)

    def order(seed, epoch):
        return [sorted(flat(ranks)) for ranks in minis(plan(lengths, epochs=2, shuffle_seed=seed), epoch)]

    assert order((1, 5), 0) == order((1, 5), 0)
    different = [order((1, 5), 0), order((1, 5), 1), order((1, 6), 0), order((2, 5), 0), order(None, 0)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_token_budget_holds(dp, seed):
    lengths = lengths_of(64, seed)
    for share in plan(lengths, mini=16, dp=dp, split=by_tokens(97, KEY)):
        for micros in share.epochs[0]:
            sums = [sum(lengths[share.rows[i]] for i in micro) for micro in micros]
            assert max(sums) <= 97
            assert len(sums) <= -(-sum(sums) // 97) + 2, "not many more packs than the tokens need"


def test_budget_below_one_sample_names_the_key():
    with pytest.raises(ValueError, match=r"some.budget=10 is less than one sequence of 50 tokens"):
        plan([50] * 8, split=by_tokens(10, KEY))


def test_micro_batches_by_count():
    split = by_count(3)
    assert split([9] * 7) == [[0, 1, 2], [3, 4, 5], [6]] and split([9] * 3) == [[0, 1, 2]]
    for share in plan(lengths_of(24), split=split):
        assert all(len(micro) <= 3 for minis in share.epochs for micros in minis for micro in micros)


def test_ranks_are_balanced_by_cost():
    lengths = sorted(lengths_of(256, longest=400))  # in order: an even cut would be most uneven
    for balance in (True, False):
        shares = plan(lengths, mini=128, dp=4, balance=balance, split=by_tokens(10_000, KEY))
        work = [quadratic(np.array([lengths[r] for r in s.rows])).sum() for s in shares]
        spread = max(work) / min(work)
        assert spread < 1.01 if balance else spread > 2


@pytest.mark.parametrize("seed", range(30))
def test_no_rank_is_left_empty_however_lopsided_the_costs(seed):
    random = np.random.default_rng(seed)
    dp = int(random.integers(2, 9))
    lengths = np.where(random.random(dp) < 0.3, 5000, random.integers(2, 9, dp))
    shares = plan(lengths.tolist(), group=1, mini=dp, dp=dp, split=by_tokens(6000, KEY))
    assert sorted(flat([s.rows for s in shares])) == list(range(dp))
    assert all(len(s.rows) == 1 for s in shares)


def test_equal_input_gives_the_equal_plan():
    lengths = lengths_of(64)
    assert plan(lengths, dp=4, shuffle_seed=(1, 1)) == plan(np.array(lengths), dp=4, shuffle_seed=(1, 1))
