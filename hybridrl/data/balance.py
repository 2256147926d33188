"""Sharing sequences out evenly: over data-parallel ranks by compute cost, and over micro-batches by token budget.

All functions are deterministic and keep indices ascending inside a bin, so that equal input gives equal packing.
"""

import heapq
from collections.abc import Sequence

import numpy as np


def karmarkar_karp(costs: Sequence[float], k: int, equal_size: bool = False) -> list[list[int]]:
    """Split indices of `costs` into k bins of nearly equal sum, by the largest differencing method.

    (Karmarkar and Karp, "The differencing method of set partitioning", 1982, in its k-way form.)
    With `equal_size` every bin has len(costs) / k items. Bins come in order of their first index, empty ones last.
    """
    costs = [float(c) for c in costs]
    assert k >= 1
    if equal_size and len(costs) % k:
        raise ValueError(f"{len(costs)} sequences cannot be shared equally over {k} ranks: "
                         f"make the batch a multiple of {k}")
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    width = k if equal_size else 1
    # A state is k bins (sum, items), largest sum first; items are nested pairs, flattened at the end.
    heap = []
    for number, start in enumerate(range(0, len(order), width)):
        bins = [(costs[i], i) for i in order[start:start + width]] + [(0.0, None)] * (k - width)
        heap.append((bins[-1][0] - bins[0][0], number, bins))
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        # Largest of one with smallest of the other: the two spreads cancel. The sort is stable: ties stay in order.
        bins = sorted(((x + y, _join(i, j)) for (x, i), (y, j) in zip(a, reversed(b), strict=True)),
                      key=lambda item: -item[0])
        heapq.heappush(heap, (bins[-1][0] - bins[0][0], number, bins))
        number += 1
    filled = [_flatten(items) for _, items in heap[0][2]] if heap else [[] for _ in range(k)]
    if equal_size and k > 1:
        filled = _swap(np.asarray(costs), filled)
    return sorted(filled, key=lambda items: (not items, items))


def _swap(costs: np.ndarray, bins: list[list[int]]) -> list[list[int]]:
    """Swap items of the heaviest and the lightest bin while that narrows their gap.

    Differencing groups of like items cannot pair an outlier with many small ones; swaps keep the sizes and can.
    """
    for _ in range(sum(map(len, bins))):
        totals = [costs[items].sum() for items in bins]
        high, low = int(np.argmax(totals)), int(np.argmin(totals))
        gap = totals[high] - totals[low]
        gain = costs[bins[high]][:, None] - costs[bins[low]][None, :]  # moved from high to low
        i, j = np.unravel_index(np.argmin(np.abs(gap - 2 * gain)), gain.shape) if gain.size else (0, 0)
        if not gain.size or abs(gap - 2 * gain[i, j]) >= gap * (1 - 1e-6):
            break
        bins[high][i], bins[low][j] = bins[low][j], bins[high][i]
    return [sorted(items) for items in bins]


def _join(a, b):
    return b if a is None else a if b is None else (a, b)


def _flatten(tree) -> list[int]:
    items, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, tuple):
            stack.extend(node)
        elif node is not None:
            items.append(node)
    return sorted(items)


def micro_batches(lengths: Sequence[int], max_tokens: int, min_bins: int = 1,
                  key: str = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu") -> list[list[int]]:
    """Bins of sequence indices, each of at most `max_tokens` tokens, few and balanced by tokens.

    At least `min_bins` of them where there are as many sequences (ranks that must run the same number agree on it).
    ValueError naming `key` when a single sequence is longer than `max_tokens`.
    """
    lengths = [int(n) for n in lengths]
    if not lengths:
        return []
    if max(lengths) > max_tokens:
        raise ValueError(f"{key}={max_tokens} is less than one sequence of {max(lengths)} tokens: raise it, or lower "
                         "data.max_prompt_length or data.max_response_length")
    wanted = min(min_bins, len(lengths))
    least = max(-(-sum(lengths) // max_tokens), sum(2 * n > max_tokens for n in lengths), wanted, 1)
    for k in range(least, min(least + least // 16 + 4, len(lengths)) + 1):
        bins = _spread(lengths, k)
        if all(bins) and max(sum(lengths[i] for i in items) for items in bins) <= max_tokens:
            return bins
    bins = _first_fit(lengths, max_tokens)
    while len(bins) < wanted:
        bins.append([max(bins, key=len).pop()])
    return bins


def _spread(lengths: list[int], k: int) -> list[list[int]]:
    """Longest first, each to the emptiest of k bins: n log k steps, where differencing would take n k."""
    bins: list[list[int]] = [[] for _ in range(k)]
    heap = [(0, b) for b in range(k)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        used, b = heap[0]
        bins[b].append(i)
        heapq.heapreplace(heap, (used + lengths[i], b))
    return sorted(sorted(items) for items in bins)


def _first_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: not balanced, but always within the budget."""
    bins, sums = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, used in enumerate(sums) if used + lengths[i] <= max_tokens), len(bins))
        if place == len(bins):
            bins.append([])
            sums.append(0)
        bins[place].append(i)
        sums[place] += lengths[i]
    return sorted(sorted(items) for items in bins)


def seq_cost(lengths: Sequence[int], *, hidden_size: int, num_layers: int, ffn_hidden_size: int, num_heads: int,
             num_kv_heads: int, head_dim: int, vocab_size: int) -> np.ndarray:
    """Floating-point operations of one forward pass for each sequence, float64 [N].

    Two a multiply-add: the projections, the gated MLP and the head are linear in the length L; causal scores and
    their weighted sum of values touch L**2 / 2 pairs each, 4 * head_dim operations a pair and head.
    """
    n = np.asarray(lengths, np.float64)
    attention = hidden_size * head_dim * (2 * num_heads + 2 * num_kv_heads)
    linear = num_layers * (attention + 3 * hidden_size * ffn_hidden_size) + hidden_size * vocab_size
    return 2.0 * linear * n + 2.0 * num_layers * num_heads * head_dim * n * n
