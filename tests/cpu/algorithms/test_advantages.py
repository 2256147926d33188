"""Advantage estimators against float64 loops over samples and tokens."""

import math
import statistics

import pytest
import torch

from hybridrl.algorithms.advantages import (
    AdvantageInputs,
    compute,
    masked_whiten,
    names,
    needs_critic,
    place_scores,
)
from hybridrl.ops.gae import gae_reference

LENGTHS = [6, 3, 0, 10, 1, 300, 4, 5, 2]
GROUPS = [7, 7, 7, -1, 7, -1, 42, 7, -1]  # not sorted, not consecutive; 42 is alone
GAMMA, LAM = 0.98, 0.9


def batch(seed=0, masked=0.3):
    """Sample 2 is empty and sample 7 counts no token: neither may enter its group's statistics."""
    generator = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).to(torch.int32)
    rewards, values = (torch.randn(int(cu[-1]), generator=generator) for _ in range(2))
    mask = (torch.rand(rewards.shape, generator=generator) >= masked).float()
    mask[cu[:-1].long().clamp(max=rewards.shape[0] - 1)] = 1.0
    mask[int(cu[7]) : int(cu[8])] = 0
    return AdvantageInputs(rewards, mask, cu, torch.tensor(GROUPS), values, GAMMA, LAM)


def change(inputs, **fields):
    return AdvantageInputs(**(vars(inputs) | fields))


def rows(inputs):
    return list(zip(inputs.cu_resp[:-1].tolist(), inputs.cu_resp[1:].tolist(), strict=True))


def whiten_by_loop(x, mask):
    kept = [a for a, m in zip(x.tolist(), mask.tolist(), strict=True) if m]
    mean, variance = statistics.fmean(kept), statistics.variance(kept)
    return torch.tensor([(a - mean) / math.sqrt(variance + 1e-8) for a in x.tolist()], dtype=torch.float64)


def outcome_by_loop(inputs, formula):
    """formula(score, scores of the sample's whole group) at every counting token, 0 elsewhere."""
    rewards, mask = inputs.token_rewards.double().tolist(), inputs.response_mask.tolist()
    scores = {i: sum(rewards[a:b]) for i, (a, b) in enumerate(rows(inputs)) if any(mask[a:b])}
    ids = inputs.group_ids.tolist()
    out = [0.0] * len(rewards)
    for i, (a, b) in enumerate(rows(inputs)):
        for t in range(a, b):
            if mask[t]:
                out[t] = formula(scores[i], [s for j, s in scores.items() if ids[j] == ids[i]])
    return torch.tensor(out, dtype=torch.float64)


def close(got, want, atol=1e-5):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=atol)


def test_gae():
    inputs = batch()
    advantages, returns = compute("gae", inputs)
    tensors = (inputs.token_rewards, inputs.values, inputs.response_mask, inputs.cu_resp)
    raw, want_returns = gae_reference(*tensors, GAMMA, LAM)
    close(advantages, whiten_by_loop(raw, inputs.response_mask), 2e-5)
    close(returns, want_returns)
    kept = advantages[inputs.response_mask != 0].double()
    assert abs(kept.mean()) < 1e-6 and abs(kept.std() - 1) < 1e-5


def test_grpo():
    def normed(r, group):
        if len(group) == 1:
            return r
        return (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)

    def centred(r, group):
        return r if len(group) == 1 else r - statistics.fmean(group)

    for formula, norm in ((normed, True), (centred, False)):
        inputs = change(batch(), norm_adv_by_std_in_grpo=norm)
        advantages, returns = compute("grpo", inputs)
        close(advantages, outcome_by_loop(inputs, formula))
        assert torch.equal(advantages, returns)


def test_rloo():
    def formula(r, group):
        n = len(group)
        return r if n == 1 else r - (sum(group) - r) / (n - 1)

    inputs = batch()
    advantages, returns = compute("rloo", inputs)
    close(advantages, outcome_by_loop(inputs, formula))
    assert torch.equal(advantages, returns)


@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_reinforce_plus_plus(masked):
    inputs = batch(masked=masked)
    advantages, returns = compute("reinforce_plus_plus", inputs)
    want = torch.zeros(returns.shape[0], dtype=torch.float64)
    for a, b in rows(inputs):
        running = 0.0
        for t in range(b - 1, a - 1, -1):
            if inputs.response_mask[t]:
                running = inputs.token_rewards[t].item() + GAMMA * running
            want[t] = running
    close(returns, want)
    whitened = whiten_by_loop(want, inputs.response_mask)
    close(advantages, torch.where(inputs.response_mask != 0, whitened, 0.0), 2e-5)


def test_equal_scores_give_exactly_zero():
    """Nothing to learn from a group that agrees: rounding must not be blown up by the division by std + 1e-6."""
    inputs = batch()
    scores = torch.full((len(LENGTHS),), 0.1)
    inputs = change(inputs, token_rewards=place_scores(scores, inputs.response_mask, inputs.cu_resp))
    lonely = torch.repeat_interleave(inputs.group_ids == 42, torch.tensor(LENGTHS))
    for name in ("grpo", "rloo"):
        advantages, _ = compute(name, inputs)
        assert (advantages[~lonely] == 0).all()
        assert (advantages[lonely & (inputs.response_mask != 0)] == 0.1).all()


@pytest.mark.parametrize("name", ["gae", "grpo", "rloo", "reinforce_plus_plus"])
def test_order_of_samples_does_not_matter(name):
    inputs = batch()
    order = [5, 0, 8, 7, 3, 1, 6, 2, 4]
    spans = [rows(inputs)[i] for i in order]
    tokens = torch.cat([torch.arange(a, b) for a, b in spans])
    cu = torch.tensor([0] + [b - a for a, b in spans], dtype=torch.int32).cumsum(0).to(torch.int32)
    shuffled = AdvantageInputs(
        *(t[tokens] for t in (inputs.token_rewards, inputs.response_mask)), cu, inputs.group_ids[order],
        inputs.values[tokens], GAMMA, LAM,
    )  # fmt: skip
    for got, want in zip(compute(name, shuffled), compute(name, inputs), strict=True):
        torch.testing.assert_close(got, want[tokens], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gae", "grpo", "rloo", "reinforce_plus_plus"])
def test_nothing_that_counts(name):
    inputs = batch()
    for empty in (
        change(inputs, response_mask=torch.zeros_like(inputs.response_mask)),
        AdvantageInputs(torch.zeros(0), torch.zeros(0), torch.tensor([0]), torch.zeros(0).long(), torch.zeros(0)),
    ):
        advantages, returns = compute(name, empty)
        assert advantages.isfinite().all() and returns.isfinite().all()
        assert advantages.shape == returns.shape == empty.response_mask.shape


def test_whitening_of_one_token():
    got = masked_whiten(torch.tensor([5.0, 3.0]), torch.tensor([0.0, 1.0]))
    assert got[1] == 0 and got.isfinite().all()


def test_place_scores():
    inputs = batch()
    scores = torch.arange(1.0, 1.0 + len(LENGTHS))
    got = place_scores(scores, inputs.response_mask, inputs.cu_resp)
    want = torch.zeros_like(got)
    for i, (a, b) in enumerate(rows(inputs)):
        counted = [t for t in range(a, b) if inputs.response_mask[t]]
        if counted:
            want[counted[-1]] = scores[i]
    assert torch.equal(got, want) and (want != 0).sum() == len(LENGTHS) - 2


def test_registry():
    assert set(names()) == {
        "gae", "gdpo", "gpg", "grpo", "grpo_passk", "grpo_vectorized", "opo", "optimal_token_baseline",
        "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "rloo", "rloo_vectorized",
        "tir_optimal_token_baseline",
    }  # fmt: skip
    assert [name for name in names() if needs_critic(name)] == ["gae"]
    with pytest.raises(ValueError, match="'ppo': it must be one of gae, gdpo, gpg, grpo"):
        compute("ppo", batch())
    with pytest.raises(ValueError, match="needs the critic's values"):
        compute("gae", change(batch(), values=None))
