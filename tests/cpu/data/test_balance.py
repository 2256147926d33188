"""Balance: partitions are exact, deterministic, near the best possible, and within the token budget."""

import itertools

import numpy as np
import pytest

from hybridrl.data.balance import karmarkar_karp, micro_batches, seq_cost


def sums(costs, bins):
    return [sum(costs[i] for i in items) for items in bins]


@pytest.mark.parametrize("equal_size", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_partition_covers_each_index_once_and_is_balanced(k, equal_size):
    costs = np.random.default_rng(k).lognormal(6, 1, 240).tolist()
    bins = karmarkar_karp(costs, k, equal_size)
    assert sorted(itertools.chain(*bins)) == list(range(240)) and len(bins) == k
    assert all(items == sorted(items) for items in bins)
    if equal_size:
        assert {len(items) for items in bins} == {240 // k}
    assert max(sums(costs, bins)) <= 1.02 * sum(costs) / k
    assert bins == karmarkar_karp(costs, k, equal_size)


def test_close_to_the_optimum_of_small_cases():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = rng.integers(1, 100, 9).tolist()
        best = min(max(sum(c for c, s in zip(costs, sides, strict=True) if s), sum(c for c, s in
                   zip(costs, sides, strict=True) if not s)) for sides in itertools.product([0, 1], repeat=9))
        # Largest differencing of two bins is within 7/6 of the best (Fischetti and Martello, 1987).
        assert max(sums(costs, karmarkar_karp(costs, 2))) <= 7 / 6 * best


def test_edges_of_partition():
    assert karmarkar_karp([], 2) == [[], []]
    assert karmarkar_karp([5.0], 3) == [[0], [], []]
    assert karmarkar_karp([3, 3, 3], 3) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="multiple of 2"):
        karmarkar_karp([1, 2, 3], 2, equal_size=True)


@pytest.mark.parametrize("seed", range(10))
def test_micro_batches_keep_the_budget_and_are_few(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 500, 100).tolist()
    bins = micro_batches(lengths, 1000)
    assert sorted(itertools.chain(*bins)) == list(range(100))
    assert max(sums(lengths, bins)) <= 1000
    assert len(bins) <= -(-sum(lengths) // 1000) + 2
    assert all(items == sorted(items) and items for items in bins)
    assert bins == micro_batches(np.array(lengths), 1000)


def test_micro_batches_with_a_least_number_and_hard_cases():
    assert micro_batches([], 10) == []
    assert micro_batches([1, 1, 1, 1], 100) == [[0, 1, 2, 3]]
    assert len(micro_batches([1, 1, 1, 1], 100, min_bins=3)) == 3
    assert len(micro_batches([1, 1], 100, min_bins=3)) == 2
    assert micro_batches([6, 6, 6], 10) == [[0], [1], [2]]
    bins = micro_batches([5, 5, 4, 4, 3, 3, 3, 3], 10)  # exactly three full bins exist
    assert max(sums([5, 5, 4, 4, 3, 3, 3, 3], bins)) <= 10 and len(bins) <= 4
    with pytest.raises(ValueError, match="some.key=10 .* 11 tokens"):
        micro_batches([3, 11], 10, key="some.key")


def test_cost_counts_the_operations_of_a_naive_model():
    shape = dict(hidden_size=8, num_layers=3, ffn_hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=2,
                 vocab_size=32)

    def naive(length):
        macs = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) * length + 8 * 32 * length
        pairs = length * length / 2
        return 2 * macs + 3 * 4 * pairs * 2 * (2 + 2)

    assert seq_cost([1, 10, 100], **shape).tolist() == [naive(1), naive(10), naive(100)]
