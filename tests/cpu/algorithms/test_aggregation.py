"""Loss aggregation against loops over sequences, and its independence of how the mini-batch was split."""

import pytest
import torch

from hybridrl.algorithms.aggregation import MODES, Denominators, aggregate, sequence_of_token, tokens_per_sequence

LENGTHS = [5, 0, 1, 12, 7, 3, 400, 2]
SCALE = 64.0


def batch(seed=0):
    """Values, mask and boundaries; the third sequence counts no token, the second is empty."""
    generator = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).to(torch.int32)
    x = torch.randn(int(cu[-1]), generator=generator)
    mask = (torch.rand(x.shape, generator=generator) > 0.3).float()
    mask[int(cu[2]) : int(cu[3])] = 0
    return x, mask, cu


def rows(cu):
    return list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))


def by_loop(x, mask, cu, mode):
    """The formulas over Python floats (float64)."""
    x, mask = x.double().tolist(), mask.tolist()
    kept = [[x[t] for t in range(a, b) if mask[t]] for a, b in rows(cu)]
    sums, counts = [sum(k) for k in kept], [len(k) for k in kept]
    sequences = sum(c > 0 for c in counts)
    return {
        "token-mean": sum(sums) / sum(counts),
        "token-sum": sum(sums),
        "seq-mean-token-sum": sum(sums) / sequences,
        "seq-mean-token-mean": sum(s / c for s, c in zip(sums, counts, strict=True) if c) / sequences,
        "seq-mean-token-sum-norm": sum(sums) / sequences / SCALE,
    }[mode]


def cut(x, mask, cu, first, last):
    """Sequences first..last-1 as a batch of their own."""
    begin, end = int(cu[first]), int(cu[last])
    return x[begin:end], mask[begin:end], cu[first : last + 1] - cu[first]


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_loop(mode):
    x, mask, cu = batch()
    got = aggregate(x, mask, cu, mode, Denominators.of(mask, cu, SCALE))
    assert got.dtype == torch.float32 and got.shape == ()
    assert got.item() == pytest.approx(by_loop(x, mask, cu, mode), rel=1e-6)


@pytest.mark.parametrize("splits", [[0, 8], [0, 3, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 3, 8]])
@pytest.mark.parametrize("mode", MODES)
def test_any_split_gives_the_same_loss_and_gradient(mode, splits):
    x, mask, cu = batch()
    denom = Denominators.of(mask, cu, SCALE)
    whole = x.clone().requires_grad_()
    want = aggregate(whole.square(), mask, cu, mode, denom)
    want.backward()
    leaf = x.clone().requires_grad_()
    got = 0.0
    for first, last in zip(splits[:-1], splits[1:], strict=True):
        part = aggregate(*cut(leaf.square(), mask, cu, first, last), mode, denom)
        part.backward()
        got += part.item()
    assert got == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_denominators_add_up():
    x, mask, cu = batch()
    whole = Denominators.of(mask, cu, SCALE)
    assert whole == Denominators(mask.sum().item(), 6.0, SCALE)
    parts = [Denominators.of(*cut(x, mask, cu, a, b)[1:], SCALE) for a, b in [(0, 3), (3, 4), (4, 8)]]
    assert parts[0] + parts[1] + parts[2] == whole


def test_counts_and_rows():
    _, mask, cu = batch()
    assert tokens_per_sequence(mask, cu).tolist() == [int(mask[a:b].sum()) for a, b in rows(cu)]
    want = [row for row, length in enumerate(LENGTHS) for _ in range(length)]
    assert sequence_of_token(cu, len(want)).tolist() == want


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_reach_neither_loss_nor_gradient(mode):
    x, mask, cu = batch()
    denom = Denominators.of(mask, cu, SCALE)
    want = aggregate(x, mask, cu, mode, denom)
    dirty = torch.where(mask == 0, torch.nan, x).requires_grad_()
    got = aggregate(dirty, mask, cu, mode, denom)
    got.backward()
    assert got.item() == want.item()
    assert (dirty.grad[mask == 0] == 0).all() and (dirty.grad[mask != 0] > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_counts_is_zero(mode):
    x, mask, cu = batch()
    empty = torch.zeros_like(mask)
    x.requires_grad_()
    got = aggregate(x, empty, cu, mode, Denominators.of(empty, cu, SCALE))
    got.backward()
    assert got.item() == 0 and (x.grad == 0).all()


def test_errors_name_the_mend():
    x, mask, cu = batch()
    with pytest.raises(ValueError, match="token-mean, token-sum, seq-mean-token-sum, seq-mean-token-mean"):
        aggregate(x, mask, cu, "mean", Denominators.of(mask, cu))
    with pytest.raises(ValueError, match="actor_rollout_ref.actor.loss_scale_factor"):
        aggregate(x, mask, cu, "seq-mean-token-sum-norm", Denominators.of(mask, cu))
