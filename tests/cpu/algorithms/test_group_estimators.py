"""Estimators without a critic against float64 loops over samples and tokens: pass@k, GDPO, ReMax, OPO, GPG, OTB."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from test_advantages import GROUPS, LENGTHS, batch, change, close, outcome_by_loop, rows, whiten_by_loop

from hybridrl.algorithms import advantages
from hybridrl.algorithms.advantages import compute, find, names, place_scores

WITHOUT_CRITIC = [name for name in names() if name != "gae"]


def full(seed=0, masked=0.3):
    """A batch with every optional input."""
    inputs = batch(seed, masked)
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = inputs.response_mask.shape[0]
    return replace(
        inputs,
        reward_baselines=torch.randn(len(LENGTHS), generator=generator),
        reward_components=torch.randn(3, len(LENGTHS), generator=generator),
        reward_weights=torch.tensor([1.0, 0.5, -2.0]),
        old_logprobs=-3 * torch.rand(tokens, generator=generator),
        sum_pi_squared=torch.rand(tokens, generator=generator),
        rollout_is_weights=0.5 + torch.rand(tokens, generator=generator),
    )


def whitened(x, mask):
    return torch.where(mask != 0, whiten_by_loop(x, mask), 0.0)


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_passk(by_std):
    def formula(r, group):
        if len(group) == 1 or r < max(group):
            return 0.0
        first, second = sorted(group)[:-3:-1]
        return (first - second) / (statistics.stdev(group) + 1e-6 if by_std else 1.0)

    inputs = change(full(), norm_adv_by_std_in_grpo=by_std)
    close(compute("grpo_passk", inputs)[0], outcome_by_loop(inputs, formula))
    tied = torch.tensor([1.0] * len(LENGTHS))
    tied = change(inputs, token_rewards=place_scores(tied, inputs.response_mask, inputs.cu_resp))
    assert (compute("grpo_passk", tied)[0] == 0).all()


def test_reinforce_plus_plus_baseline():
    inputs = full()
    want = outcome_by_loop(inputs, lambda r, group: r if len(group) == 1 else r - statistics.fmean(group))
    close(compute("reinforce_plus_plus_baseline", inputs)[0], whitened(want, inputs.response_mask), 2e-5)


@pytest.mark.parametrize("by_std", [True, False])
def test_gdpo(by_std):
    def formula(r, group):
        if len(group) == 1:
            return r
        return (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6 if by_std else 1.0)

    inputs = change(full(), norm_adv_by_std_in_grpo=by_std)
    total = 0.0
    for weight, scores in zip(inputs.reward_weights.tolist(), inputs.reward_components):
        part = change(inputs, token_rewards=place_scores(scores, inputs.response_mask, inputs.cu_resp))
        total = total + weight * outcome_by_loop(part, formula)
    close(compute("gdpo", inputs)[0], whitened(total, inputs.response_mask), 2e-5)


def reward_to_go(inputs):
    rewards, mask = inputs.token_rewards.double().tolist(), inputs.response_mask.tolist()
    return torch.tensor(
        [sum(r for r, m in zip(rewards[t:b], mask[t:b]) if m) for a, b in rows(inputs) for t in range(a, b)],
        dtype=torch.float64,
    )


def test_remax():
    inputs = full()
    got, returns = compute("remax", inputs)
    want = reward_to_go(inputs)
    baselines = torch.repeat_interleave(inputs.reward_baselines.double(), torch.tensor(LENGTHS))
    close(returns, want)
    close(got, torch.where(inputs.response_mask != 0, want - baselines, 0.0))


def test_opo():
    inputs = full()
    lengths = [sum(inputs.response_mask[a:b].tolist()) for a, b in rows(inputs)]
    scores = [sum(inputs.token_rewards[a:b].double().tolist()) for a, b in rows(inputs)]
    want = torch.zeros(inputs.response_mask.shape[0], dtype=torch.float64)
    for i, (a, b) in enumerate(rows(inputs)):
        peers = [j for j in range(len(LENGTHS)) if GROUPS[j] == GROUPS[i] and lengths[j]]
        baseline = 0.0
        if len(peers) > 1:
            baseline = sum(lengths[j] * scores[j] for j in peers) / sum(lengths[j] for j in peers)
        want[a:b] = (scores[i] - baseline) * inputs.response_mask[a:b]
    close(compute("opo", inputs)[0], want)


def test_gpg():
    inputs = full()
    scores = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 5, 1])  # sample 2 is empty and 7 counts no token: 7 are left
    inputs = change(inputs, token_rewards=place_scores(scores, inputs.response_mask, inputs.cu_resp))
    want = outcome_by_loop(inputs, lambda r, g: 7 / 3 * (r if len(g) == 1 else r - statistics.fmean(g)))
    close(compute("gpg", inputs)[0], want)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name, compact", [("optimal_token_baseline", False), ("tir_optimal_token_baseline", True)])
def test_optimal_token_baseline(name, compact, corrected):
    inputs = full() if corrected else change(full(), rollout_is_weights=None)
    go, mask = reward_to_go(inputs).tolist(), inputs.response_mask.tolist()
    pi, squares = inputs.old_logprobs.double().exp().tolist(), inputs.sum_pi_squared.double().tolist()
    rho = inputs.rollout_is_weights.double().tolist() if corrected else [1.0] * len(go)
    cells: dict = {}  # (group, slot) -> [(token, G, W)]
    for i, (a, b) in enumerate(rows(inputs)):
        weight, seen = 0.0, 0
        for t in range(a, b):
            if mask[t]:
                weight += (1 - 2 * pi[t] + squares[t]) * rho[t] ** 2
                cells.setdefault((GROUPS[i], seen if compact else t - a), []).append((t, go[t], weight))
                seen += 1
    want = torch.zeros(len(go), dtype=torch.float64)
    for cell in cells.values():
        total = sum(w for *_, w in cell) + 1e-8
        baseline = sum(g * w for _, g, w in cell) / total if len(cell) > 1 else 0.0
        for t, g, _ in cell:
            want[t] = g - baseline
    close(compute(name, inputs)[0], want, 1e-4)


def test_aliases():
    for one, other in (("grpo", "grpo_vectorized"), ("rloo", "rloo_vectorized")):
        assert torch.equal(compute(one, full())[0], compute(other, full())[0])


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_order_of_samples_does_not_matter(name):
    inputs, order = full(), [5, 0, 8, 7, 3, 1, 6, 2, 4]
    spans = [rows(inputs)[i] for i in order]
    tokens = torch.cat([torch.arange(a, b) for a, b in spans])
    cu = torch.tensor([0] + [b - a for a, b in spans], dtype=torch.int32).cumsum(0).to(torch.int32)
    moved = {"cu_resp": cu, "reward_components": inputs.reward_components[:, order]}
    moved |= {key: getattr(inputs, key)[order] for key in ("group_ids", "reward_baselines")}
    per_token = ("token_rewards", "response_mask", "values", "old_logprobs", "sum_pi_squared", "rollout_is_weights")
    moved |= {key: getattr(inputs, key)[tokens] for key in per_token}
    for got, want in zip(compute(name, replace(inputs, **moved)), compute(name, inputs), strict=True):
        torch.testing.assert_close(got, want[tokens], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_masked_tokens_and_nothing_that_counts(name):
    inputs = full()
    assert (compute(name, inputs)[0][inputs.response_mask == 0] == 0).all()
    for number in compute(name, change(inputs, response_mask=torch.zeros_like(inputs.response_mask))):
        assert number.isfinite().all()


def test_missing_inputs_are_named():
    for name in names():
        for need in find(name).needs:
            with pytest.raises(ValueError, match=f"{name} needs"):
                compute(name, change(full(), **{need: None}))


def test_a_wrong_shape_is_said(monkeypatch):
    wrong = advantages.Estimator(lambda inputs: (torch.zeros(2), torch.zeros(2)))
    monkeypatch.setitem(advantages._ESTIMATORS, "wrong", wrong)
    with pytest.raises(ValueError, match="one number a response token"):
        compute("wrong", full())


def test_scale_of_passk_is_that_of_the_group():
    """Two samples, 1 and 0: std is 1 / sqrt 2."""
    cu, mask = torch.tensor([0, 1, 2]), torch.ones(2)
    inputs = advantages.AdvantageInputs(torch.tensor([1.0, 0.0]), mask, cu, torch.zeros(2).long())
    assert compute("grpo_passk", inputs)[0].tolist() == pytest.approx([math.sqrt(2), 0.0], rel=1e-5)
