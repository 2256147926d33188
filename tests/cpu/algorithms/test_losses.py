"""Policy and value losses against float64 loops, and their independence of the split into micro-batches."""

import math

import pytest
import torch

from hybridrl.algorithms.aggregation import MODES, Denominators
from hybridrl.algorithms.policy_losses import PolicyLossInputs, names, policy_loss
from hybridrl.algorithms.value_loss import value_loss

LENGTHS = [9, 1, 0, 30, 200, 4]
LOW, HIGH, DUAL = 0.2, 0.28, 1.5  # a dual clip this low is reached often


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    old, new, adv = (torch.randn(int(cu[-1]), generator=generator) for _ in range(3))
    mask = (torch.rand(old.shape, generator=generator) > 0.25).float()
    return old - 3, old - 3 + 0.4 * new, adv, mask, cu


def vanilla(old, new, adv, mask, cu, mode="token-mean", denom=None):
    denom = denom or Denominators.of(mask, cu, 50.0)
    return policy_loss("vanilla", PolicyLossInputs(new, old, adv, mask, cu, denom, mode, LOW, HIGH, DUAL))


def vanilla_by_loop(old, new, adv):
    """Loss, clipped, dual-clipped and log-ratio of one token."""
    log_ratio = max(-20.0, min(20.0, new - old))
    ratio = math.exp(log_ratio)
    unclipped, clipped = -adv * ratio, -adv * max(1 - LOW, min(1 + HIGH, ratio))
    loss = max(unclipped, clipped)
    dual = adv < 0 and loss > -adv * DUAL
    return (-adv * DUAL if dual else loss), clipped > unclipped, dual, log_ratio


def test_vanilla_equals_the_loop():
    old, new, adv, mask, cu = batch()
    new[0], old[0], adv[0], mask[0] = 0.0, -50.0, -1.0, 1.0  # beyond the clamp of the log-ratio
    loss, metrics = vanilla(old, new, adv, mask, cu)
    tokens = [
        vanilla_by_loop(*values) for *values, m in zip(*(t.double().tolist() for t in (old, new, adv, mask))) if m
    ]
    n = len(tokens)
    assert loss.item() == pytest.approx(sum(t[0] for t in tokens) / n, rel=1e-5)
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(sum(t[1] for t in tokens) / n, rel=1e-6)
    assert metrics["actor/pg_clipfrac_lower"].item() == pytest.approx(sum(t[2] for t in tokens) / n, rel=1e-6)
    assert metrics["actor/ppo_kl"].item() == pytest.approx(-sum(t[3] for t in tokens) / n, rel=1e-5)
    assert 0.1 < metrics["actor/pg_clipfrac"] < 0.9 and 0 < metrics["actor/pg_clipfrac_lower"] < 0.5


def test_vanilla_gradient_is_the_policy_gradient_where_nothing_is_clipped():
    """At ratio 1 it is -A / tokens exactly; where the clip decides it is 0."""
    old, _, adv, mask, cu = batch()
    leaf = old.clone().requires_grad_()
    vanilla(old, leaf, adv, mask, cu)[0].backward()
    torch.testing.assert_close(leaf.grad, -adv * mask / mask.sum(), rtol=1e-6, atol=1e-9)
    far = (old + 1.0).requires_grad_()  # ratio e: clipped where A > 0, dual-clipped where A < 0
    vanilla(old, far, adv, mask, cu)[0].backward()
    assert (far.grad == 0).all()


def pieces(cu, splits):
    for first, last in zip(splits[:-1], splits[1:], strict=True):
        yield slice(int(cu[first]), int(cu[last])), cu[first : last + 1] - cu[first]


@pytest.mark.parametrize("splits", [[0, 1, 2, 3, 4, 5, 6], [0, 4, 6], [0, 2, 3, 6]])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_does_not_depend_on_the_split(mode, splits):
    old, new, adv, mask, cu = batch()
    denom = Denominators.of(mask, cu, 50.0)
    whole = new.clone().requires_grad_()
    want, want_metrics = vanilla(old, whole, adv, mask, cu, mode, denom)
    want.backward()
    leaf = new.clone().requires_grad_()
    got, got_metrics = 0.0, dict.fromkeys(want_metrics, 0.0)
    for part, part_cu in pieces(cu, splits):
        loss, metrics = vanilla(old[part], leaf[part], adv[part], mask[part], part_cu, mode, denom)
        loss.backward()
        got += loss.item()
        got_metrics = {name: got_metrics[name] + metrics[name].item() for name in got_metrics}
    assert got == pytest.approx(want.item(), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-6, atol=1e-9)
    for name, value in got_metrics.items():
        assert value == pytest.approx(want_metrics[name].item(), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("mode", MODES)
def test_value_loss_equals_the_loop_and_does_not_depend_on_the_split(mode):
    old, new, returns, mask, cu = batch(1)
    denom = Denominators.of(mask, cu, 50.0)
    whole = new.clone().requires_grad_()
    want, want_metrics = value_loss(whole, old, returns, mask, cu, denom, 0.3, mode)
    want.backward()

    token_losses, clipped = [], 0
    for v, o, r, m in zip(*(t.double().tolist() for t in (new, old, returns, mask)), strict=True):
        plain, limited = (v - r) ** 2, (max(o - 0.3, min(o + 0.3, v)) - r) ** 2
        token_losses.append(0.5 * max(plain, limited) * m)
        clipped += m * (limited > plain)
    bounds = list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    sums = [sum(token_losses[a:b]) for a, b in bounds]
    counts = [sum(mask[a:b].tolist()) for a, b in bounds]
    by_loop = {
        "token-mean": sum(sums) / denom.tokens,
        "token-sum": sum(sums),
        "seq-mean-token-sum": sum(sums) / denom.sequences,
        "seq-mean-token-mean": sum(s / c for s, c in zip(sums, counts, strict=True) if c) / denom.sequences,
        "seq-mean-token-sum-norm": sum(sums) / denom.sequences / 50.0,
    }[mode]
    assert want.item() == pytest.approx(by_loop, rel=1e-5)
    assert want_metrics["critic/vf_clipfrac"].item() == pytest.approx(clipped / denom.tokens, rel=1e-6)
    assert want_metrics["critic/vpred_mean"].item() == pytest.approx((new * mask).sum().item() / denom.tokens, rel=1e-5)

    leaf, got = new.clone().requires_grad_(), 0.0
    for part, part_cu in pieces(cu, [0, 1, 4, 6]):
        loss, _ = value_loss(leaf[part], old[part], returns[part], mask[part], part_cu, denom, 0.3, mode)
        loss.backward()
        got += loss.item()
    assert got == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_masked_garbage_reaches_nothing():
    old, new, adv, mask, cu = batch()
    want = vanilla(old, new, adv, mask, cu)[0]
    off = mask == 0
    old[off], adv[off] = float("nan"), float("inf")
    leaf = new.clone().requires_grad_()
    got, metrics = vanilla(old, leaf, adv, mask, cu)
    got.backward()
    assert got.item() == want.item() and all(m.isfinite() for m in metrics.values())
    assert (leaf.grad.nan_to_num(0.0)[off] == 0).all()


def test_errors():
    assert set(names()) == {
        "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"
    }  # fmt: skip
    old, new, adv, mask, cu = batch()
    inputs = PolicyLossInputs(new, old, adv, mask, cu, Denominators.of(mask, cu))
    with pytest.raises(ValueError, match="loss_mode 'ppo': it must be one of cispo, clip_cov"):
        policy_loss("ppo", inputs)
    with pytest.raises(ValueError, match="clip_ratio_c=1.0"):
        policy_loss("vanilla", PolicyLossInputs(**(vars(inputs) | {"clip_ratio_c": 1.0})))
