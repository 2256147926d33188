"""Every policy loss against a float64 loop of its formula, gradients included, and its independence of the split."""

import math
import random
import statistics

import pytest
import torch
from test_losses import LENGTHS, batch, pieces

from hybridrl.algorithms import policy_losses
from hybridrl.algorithms.aggregation import MODES, Denominators
from hybridrl.algorithms.policy_losses import LossOptions, PolicyLossInputs, names, policy_loss

LOW, HIGH, DUAL, SCALE = 0.2, 0.28, 1.5, 50.0
OPTIONS = LossOptions(tau_pos=0.8, tau_neg=1.7, ppo_kl_coef=0.6, dro_beta=0.3)
ALL = [*names(), "reinforce"]
FORCED = {"gspo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}


def case(weighted=True, seed=0):
    """Keyword arguments of PolicyLossInputs without logprobs, and the log-probs."""
    old, new, adv, mask, cu = batch(seed)
    old = old.clamp(max=-0.3)  # probabilities below 1
    new = (old + 0.5 * (new - old)).clamp(max=-0.05)
    generator = torch.Generator().manual_seed(9)
    return dict(
        old_logprobs=old,
        advantages=adv,
        response_mask=mask,
        cu_resp=cu,
        denom=Denominators.of(mask, cu, SCALE),
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        clip_ratio_c=DUAL,
        selected=(torch.rand(old.shape, generator=generator) < 0.3).float(),
        rollout_is_weights=torch.rand(old.shape, generator=generator) if weighted else None,
        options=OPTIONS,
    ), new


def clip(r):
    return max(1 - LOW, min(1 + HIGH, r))


def sequence(new, old, adv, mask):
    """Means over the sequence's counting tokens: log-ratio, GMPO's clipped log-ratio, advantage."""
    kept = [(n - o, a) for n, o, a, m in zip(new, old, adv, mask) if m]
    if not kept:
        return 0.0, 0.0, 0.0
    signed = []
    for d, a in kept:
        sign, clamped = math.copysign(1, a), max(-LOW, min(HIGH, d))
        signed.append(sign * min(sign * d, sign * clamped))
    return statistics.fmean(d for d, _ in kept), statistics.fmean(signed), statistics.fmean(a for _, a in kept)


def token(name, n, o, a, chosen, means, constant):
    """The loss of a token in Python floats. n, o: log pi, log pi_old; constant: log pi where it is held fixed."""
    d, r = n - o, math.exp(n - o)
    pi, pi_old = math.exp(constant), math.exp(o)
    fixed = math.exp(constant - o)
    ppo = max(-a * r, -a * clip(r))
    if name == "vanilla":
        return min(ppo, -a * DUAL) if a < 0 else ppo
    if name in ("dppo_tv", "dppo_kl"):
        if name == "dppo_tv":
            inside = pi - pi_old <= HIGH if a > 0 else pi_old - pi <= LOW
        else:
            kl = pi_old * math.log(pi_old / pi) + (1 - pi_old) * math.log((1 - pi_old) / (1 - pi))
            inside = (kl <= HIGH or pi <= pi_old) if a > 0 else (kl <= LOW or pi >= pi_old)
        return -a * min(fixed, DUAL) * n if inside else 0.0
    if name == "gspo":
        s = math.exp(means[0] + n - constant)
        return max(-a * s, -a * clip(s))
    if name == "sapo":
        tau = OPTIONS.tau_pos if a > 0 else OPTIONS.tau_neg
        return -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
    if name in ("gpg", "reinforce"):
        return -a * n
    if name == "clip_cov":
        return 0.0 if chosen and not -a * clip(r) > -a * r else ppo
    if name == "kl_cov":
        return -a * r + (OPTIONS.ppo_kl_coef * abs(d) if chosen else 0.0)
    if name == "geo_mean":
        return -means[2] * math.exp(means[1])
    if name == "dro":
        return -(a * n - OPTIONS.dro_beta / 2 * d * d)
    assert name == "cispo"
    return -clip(fixed) * a * n


def by_loop(name, mode, inputs, logprobs, constants=None):
    """The whole loss in float64. constants: the log-probs that definitions hold fixed (default: the same)."""
    columns = ("old_logprobs", "advantages", "response_mask", "selected")
    old, adv, mask, chosen = (inputs[c].double().tolist() for c in columns)
    new = logprobs.double().tolist()
    fixed = new if constants is None else constants.double().tolist()
    weights = inputs["rollout_is_weights"]
    weights = [1.0] * len(new) if weights is None else weights.double().tolist()
    cu = inputs["cu_resp"].tolist()
    sums, counts = [], []
    for a, b in zip(cu[:-1], cu[1:]):
        # GSPO's sequence ratio is under the stop-gradient, GMPO's is not
        means = sequence((fixed if name == "gspo" else new)[a:b], old[a:b], adv[a:b], mask[a:b])
        kept = [t for t in range(a, b) if mask[t]]
        sums.append(sum(weights[t] * token(name, new[t], old[t], adv[t], chosen[t], means, fixed[t]) for t in kept))
        counts.append(len(kept))
    sequences = sum(c > 0 for c in counts)
    return {
        "token-mean": sum(sums) / sum(counts),
        "token-sum": sum(sums),
        "seq-mean-token-sum": sum(sums) / sequences,
        "seq-mean-token-mean": sum(s / c for s, c in zip(sums, counts) if c) / sequences,
        "seq-mean-token-sum-norm": sum(sums) / sequences / SCALE,
    }[FORCED.get(name, mode)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_loss_equals_the_loop(name, mode, weighted):
    inputs, new = case(weighted)
    got, metrics = policy_loss(name, PolicyLossInputs(new, mode=mode, **inputs))
    assert got.item() == pytest.approx(by_loop(name, mode, inputs, new), rel=2e-5, abs=1e-6)
    assert "actor/ppo_kl" in metrics and all(m.shape == () and m.isfinite() for m in metrics.values())


@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_central_differences_of_the_loop(name):
    inputs, new = case()
    leaf = new.clone().requires_grad_()
    policy_loss(name, PolicyLossInputs(leaf, mode="seq-mean-token-mean", **inputs))[0].backward()
    generator, step = random.Random(0), 1e-6
    for t in generator.sample(range(new.shape[0]), 12):
        ends = []
        for sign in (1, -1):
            moved = new.double()
            moved[t] += sign * step
            ends.append(by_loop(name, "seq-mean-token-mean", inputs, moved, constants=new))
        assert leaf.grad[t].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=2e-7), t


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_random_splits_change_nothing(name, mode):
    inputs, new = case()
    whole = new.clone().requires_grad_()
    want, want_metrics = policy_loss(name, PolicyLossInputs(whole, mode=mode, **inputs))
    want.backward()
    per_token = ("old_logprobs", "advantages", "response_mask", "selected", "rollout_is_weights")
    generator = random.Random(name + mode)
    for _ in range(3):
        cuts = [0, *sorted(generator.sample(range(1, len(LENGTHS)), generator.randint(1, 4))), len(LENGTHS)]
        leaf, got, got_metrics = new.clone().requires_grad_(), 0.0, dict.fromkeys(want_metrics, 0.0)
        for part, cu in pieces(inputs["cu_resp"], cuts):
            piece = inputs | {key: inputs[key][part] for key in per_token} | {"cu_resp": cu}
            loss, metrics = policy_loss(name, PolicyLossInputs(leaf[part], mode=mode, **piece))
            loss.backward()
            got += loss.item()
            got_metrics = {key: got_metrics[key] + metrics[key].item() for key in got_metrics}
        assert got == pytest.approx(want.item(), rel=1e-6, abs=1e-6)
        torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-6, atol=1e-8)
        assert got_metrics == pytest.approx({k: v.item() for k, v in want_metrics.items()}, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("gpg", "reinforce", "dro")])
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    """At pi = pi_old every loss of a ratio starts from -A (GMPO: from the sequence's mean A), nothing is clipped."""
    inputs, _ = case(weighted=False)
    inputs["selected"] = torch.zeros_like(inputs["selected"])
    leaf = inputs["old_logprobs"].clone().requires_grad_()
    policy_loss(name, PolicyLossInputs(leaf, mode="seq-mean-token-mean", **inputs))[0].backward()
    made = PolicyLossInputs(leaf.detach(), mode="seq-mean-token-mean", **inputs)
    adv = made.sequence_mean(made.advantages) if name == "geo_mean" else made.advantages
    plain = leaf.detach().clone().requires_grad_()
    inputs["advantages"] = adv
    policy_loss("gpg", PolicyLossInputs(plain, mode="seq-mean-token-mean", **inputs))[0].backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-5, atol=1e-8)


def test_a_reduced_loss_is_refused(monkeypatch):
    inputs, new = case()
    monkeypatch.setitem(policy_losses._LOSSES, "own", policy_losses.PolicyLoss(lambda i: (i.logprobs.mean(), {})))
    with pytest.raises(ValueError, match="return one number a response token, unreduced"):
        policy_loss("own", PolicyLossInputs(new, **inputs))
