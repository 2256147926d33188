"""KL estimators against their formulas in float64, their gradients, and the controllers."""

import math

import pytest
import torch

from hybridrl.algorithms.kl import AdaptiveKLController, kl_penalty, make_kl_controller, penalize_rewards

D = [0.0, 1e-3, -0.4, 0.7, 3.0, -3.0, 30.0, -30.0]  # log pi - log pi_ref
FORMULAS = {
    "k1": lambda d: d,
    "abs": abs,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: max(min(math.exp(-c) - 1 + c, 10.0), -10.0) if (c := max(min(d, 20.0), -20.0)) is not None else 0,
}
NAMES = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def logprobs(dtype=torch.float32):
    ref = torch.full((len(D),), -31.0, dtype=torch.float64)
    return (ref + torch.tensor(D, dtype=torch.float64)).to(dtype), ref.to(dtype)


@pytest.mark.parametrize("suffix", ["", "+"])
@pytest.mark.parametrize("kind", NAMES)
def test_value(kind, suffix):
    got = kl_penalty(*logprobs(), kind + suffix)
    want = [FORMULAS[NAMES[kind]](d) for d in D]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("kind", NAMES)
def test_gradient(kind):
    """Plain: the derivative by central differences in float64. With `+`: that of k2, which is d."""
    pi, ref = logprobs(torch.float64)
    away_from_kinks = [1, 2, 3, 4]
    step = 1e-6
    for suffix in ("", "+"):
        leaf = pi.clone().requires_grad_()
        kl_penalty(leaf, ref, kind + suffix).sum().backward()
        for i in away_from_kinks:
            up, down = (FORMULAS["k2" if suffix else NAMES[kind]](D[i] + s) for s in (step, -step))
            assert leaf.grad[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9), (kind, suffix, i)


def test_k3_is_unbiased_and_never_negative():
    """Over a whole categorical distribution the expectations of k1 and k3 are the KL divergence itself."""
    generator = torch.Generator().manual_seed(0)
    pi, ref = (torch.randn(50, generator=generator, dtype=torch.float64).div(2).log_softmax(0) for _ in range(2))
    exact = (pi.exp() * (pi - ref)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((pi.exp() * kl_penalty(pi, ref, kind)).sum(), exact, rtol=1e-9, atol=0)
    assert (kl_penalty(pi, ref, "k3") >= 0).all()


@pytest.mark.parametrize("kind", ["full", "", "+", "k4", "k3++"])
def test_unknown_kind(kind):
    with pytest.raises(ValueError, match="kl, k1, abs, mse, k2, low_var_kl, k3"):
        kl_penalty(*logprobs(), kind)


def test_penalized_rewards():
    """Two sequences and one that counts nothing; the batch's KL is a mean of means."""
    cu = torch.tensor([0, 2, 5, 6])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    d = torch.tensor([0.25, 0.5, -1.0, float("nan"), 2.0, 9.0])
    rewards, kl = penalize_rewards(torch.ones(6), d, torch.zeros(6), mask, cu, "k1", 0.5)
    assert rewards.tolist() == [0.875, 0.75, 1.5, 1.0, 0.0, 1.0]
    assert kl == pytest.approx(((0.25 + 0.5) / 2 + (-1.0 + 2.0) / 2) / 2)


def test_adaptive_controller():
    controller = make_kl_controller("adaptive", kl_coef=0.1, horizon=1000, target_kl=2.0)
    value = 0.1
    for current, steps in [(2.0, 100), (2.1, 100), (50.0, 256), (0.0, 256), (1.9, 1000)]:
        controller.update(current, steps)
        value *= 1 + max(-0.2, min(0.2, current / 2.0 - 1)) * steps / 1000
        assert controller.value == pytest.approx(value, rel=1e-12)
    resumed = AdaptiveKLController(0.1, 2.0, 1000)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value


def test_fixed_controller_obeys_the_configuration():
    controller = make_kl_controller("fixed", kl_coef=0.05, horizon=1, target_kl=1.0)
    controller.update(100.0, 100)
    assert controller.value == 0.05
    adaptive = make_kl_controller("adaptive", 0.3, 10, 1.0)
    adaptive.load_state_dict(controller.state_dict())
    controller.load_state_dict(adaptive.state_dict())
    assert (controller.value, adaptive.value) == (0.05, 0.3)


@pytest.mark.parametrize(
    "change, key",
    [({"type": "pid"}, "algorithm.kl_ctrl.type"), ({"horizon": 0}, "horizon=0"), ({"target_kl": -1.0}, "target_kl=-1")],
)
def test_controller_errors_name_the_key(change, key):
    settings = {"type": "adaptive", "kl_coef": 0.1, "horizon": 10, "target_kl": 1.0}
    with pytest.raises(ValueError, match=key):
        make_kl_controller(**(settings | change))
