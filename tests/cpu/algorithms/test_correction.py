"""Rollout correction, the tokens of clip_cov and kl_cov, and DAPO's rules against loops over tokens and sequences."""

import math
import statistics

import numpy as np
import pytest
import torch
from test_losses import batch, pieces

from hybridrl.algorithms import covariance, dapo
from hybridrl.algorithms.aggregation import Denominators
from hybridrl.algorithms.correction import (
    RS_OPTIONS,
    Correction,
    correct,
    correct_live,
    is_bounds,
    rs_bounds,
    statistic,
)


def case(spread=0.4):
    """(trainer's log-probs, rollout's, mask, cu)."""
    old, new, _, mask, cu = batch(3)
    return old + spread * (new - old), old, mask, cu


def by_sequence(x, mask, cu):
    return [[v for v, m in zip(x[a:b], mask[a:b]) if m] for a, b in zip(cu[:-1].tolist(), cu[1:].tolist())]


def differences(logprobs, rollout, mask, cu):
    d = [max(-20.0, min(20.0, v)) for v in (logprobs.double() - rollout.double()).tolist()]
    return d, by_sequence(d, mask.tolist(), cu)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("threshold", ["1.2", "0.8_1.3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights(level, threshold, normalise):
    logprobs, rollout, mask, cu = case(1.0 if level == "token" else 0.2)
    found = correct(Correction(level, threshold, normalise, None, None), logprobs, rollout, mask, cu)
    d, parts = differences(logprobs, rollout, mask, cu)
    lower, upper = is_bounds(threshold)

    def bounded(w):
        return min(w, upper) if lower is None else (w if lower <= w <= upper else 0.0)

    want = []
    for i, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist())):
        whole = math.exp(max(-20.0, min(20.0, sum(parts[i]))))
        want += [bounded(whole if level == "sequence" else math.exp(d[t])) * mask[t].item() for t in range(a, b)]
    if normalise:
        kept = by_sequence(want, mask.tolist(), cu)
        each = [w for part in kept for w in part] if level == "token" else [part[0] for part in kept if part]
        factor = found.metrics["rollout_corr/rollout_is_batch_norm_factor"]
        assert factor == pytest.approx(statistics.fmean(each), rel=1e-5)
        want = [w / statistics.fmean(each) for w in want]
    torch.testing.assert_close(found.weights.double(), torch.tensor(want, dtype=torch.float64), rtol=2e-5, atol=1e-6)
    assert torch.equal(found.mask, mask)
    high = [w > upper for w in map(math.exp, (v for part in parts for v in part))]
    if level == "token":
        share = found.metrics["rollout_corr/rollout_is_ratio_fraction_high"]
        assert share == pytest.approx(statistics.fmean(high), abs=1e-6) and 0 < share < 1


@pytest.mark.parametrize("name", RS_OPTIONS)
def test_statistics(name):
    logprobs, rollout, mask, cu = case()
    _, parts = differences(logprobs, rollout, mask, cu)
    level, kind = name.rsplit("_", 1)
    k = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - 1 - d}[kind]
    got = by_sequence(statistic(name, logprobs - rollout, mask, cu).tolist(), mask.tolist(), cu)
    for part, values in zip(parts, got):
        tokens = [k(d) for d in part]
        whole = {"seq_sum": sum, "seq_mean": lambda x: sum(x) / max(len(x), 1), "seq_max": lambda x: max(x, default=0)}
        want = tokens if level == "token" else [whole[level](tokens)] * len(part)
        assert values == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_rejection_of_tokens_and_sequences():
    logprobs, rollout, mask, cu = case()
    _, parts = differences(logprobs, rollout, mask, cu)
    settings = Correction(None, "2.0", False, "token_k1,seq_mean_k2", "0.7_1.25,0.02")
    found = correct(settings, logprobs, rollout, mask, cu)
    kept = by_sequence(found.mask.tolist(), mask.tolist(), cu)
    for part, values in zip(parts, kept):
        sequence = sum(d * d / 2 for d in part) / max(len(part), 1) <= 0.02
        assert values == [float(sequence and math.log(0.7) <= -d <= math.log(1.25)) for d in part]
    assert found.weights is None and (found.mask <= mask).all()
    gone = 1 - found.mask.sum() / mask.sum()
    assert found.metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(gone.item()) and 0 < gone < 1


def test_nothing_to_correct_leaves_everything():
    _, rollout, mask, cu = case()
    found = correct(Correction("sequence", "2.0", True, "seq_sum_k3,token_k1", "1e-6,1.01"), rollout, rollout, mask, cu)
    assert torch.equal(found.weights, mask) and torch.equal(found.mask, mask)


@pytest.mark.parametrize("threshold", ["0.5_", "0", "-1", "2_1", "0.55", "x", "1_2_3"])
def test_refused_thresholds(threshold):
    with pytest.raises(ValueError, match="rollout_is_threshold"):
        is_bounds(threshold)


@pytest.mark.parametrize(
    "options, threshold, says",
    [
        ("token_k4", "1", "token_k4"),
        ("seq_max_k1", "1", "seq_max_k1"),
        ("token_k1", None, "needs"),
        ("token_k1,token_k2", "1,2,3", "one for each of 2"),
        ("token_k2", "0.5_2.0", "upper bound only"),
    ],
)
def test_refused_rejections(options, threshold, says):
    with pytest.raises(ValueError, match=says):
        rs_bounds(options, threshold)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_live_correction_equals_the_batch_s_and_does_not_depend_on_the_split(level):
    logprobs, rollout, mask, cu = case(0.2)
    settings = Correction(level, "0.5_1.5", False, "seq_max_k2", "0.05")
    want, denom = correct(settings, logprobs, rollout, mask, cu), Denominators.of(mask, cu)
    total = 0.0
    for part, part_cu in pieces(cu, [0, 2, 3, 6]):
        piece = (logprobs[part].requires_grad_(), rollout[part], mask[part], part_cu)
        weights, kept, metrics = correct_live(settings, *piece, denom)
        assert torch.equal(weights, want.weights[part]) and torch.equal(kept, want.mask[part])
        assert not weights.requires_grad
        total += metrics["rollout_corr/rollout_is_mean"].item()
    assert total == pytest.approx(want.metrics["rollout_corr/rollout_is_mean"], rel=1e-5)


def tokens(order=None):
    """Random advantages and log-probs of 8 samples, in another order if given, with the tokens' keys."""
    generator, lengths = np.random.default_rng(5), [3, 0, 9, 4, 60, 7, 1, 12]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    adv, logp = generator.standard_normal((2, starts[-1])).astype(np.float32)
    mask = (generator.random(starts[-1]) > 0.2).astype(np.float32)
    order = list(range(8)) if order is None else order
    place = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths)[order])])
    keys = covariance.token_keys([f"1-{i // 2}" for i in order], [i % 2 for i in order], offsets, 7)
    return *(torch.from_numpy(x[place]) for x in (adv, logp, mask)), keys, place


def test_covariance_and_selection_by_loop():
    adv, logp, mask, keys, _ = tokens()
    found = covariance.token_covariance(adv, logp, mask)
    kept = [t for t in range(len(mask)) if mask[t]]
    means = [statistics.fmean(x[t].item() for t in kept) for x in (adv, logp)]
    want = {t: (adv[t].item() - means[0]) * (logp[t].item() - means[1]) for t in kept}
    assert {t: found[t].item() for t in kept} == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert found.isnan().sum() == len(mask) - len(kept)
    share = int(0.1 * len(kept))
    largest = sorted(kept, key=lambda t: -want[t])[:share]
    assert torch.nonzero(covariance.select_for_kl(found, keys, 0.1)).squeeze(1).tolist() == sorted(largest)
    inside = [t for t in kept if 0.1 < want[t] < 1.0]
    drawn = torch.nonzero(covariance.select_for_clip(found, keys, 0.1, 0.1, 1.0)).squeeze(1).tolist()
    assert drawn == sorted(sorted(inside, key=lambda t: keys[t])[:share]) and len(drawn) == share < len(inside)
    assert covariance.select_for_clip(found, keys, 0.1, 50.0, 60.0).sum() == 0
    assert covariance.select_for_kl(found, keys, 1e-9).sum() == 1  # at least one


def test_selection_does_not_depend_on_the_order_and_is_new_each_step():
    adv, logp, mask, keys, _ = tokens()
    want = covariance.select_for_clip(covariance.token_covariance(adv, logp, mask), keys, 0.1, -9.0, 9.0)
    adv, logp, mask, moved_keys, place = tokens([7, 2, 4, 1, 0, 6, 3, 5])
    got = covariance.select_for_clip(covariance.token_covariance(adv, logp, mask), moved_keys, 0.1, -9.0, 9.0)
    assert torch.equal(got, want[place]) and len(set(keys.tolist())) == len(keys)
    other = covariance.token_keys(["2-0"], [0], np.array([0, 3]), 7)
    assert not np.array_equal(other, keys[:3])


def test_informative_groups():
    metric = np.array([1.0, 1.0, 0.0, 1.0, np.nan, 0.0, np.nan, 2.0])
    uids = np.array(["a", "a", "b", "b", "c", "c", "d", "d"])
    assert dapo.informative(metric, uids).tolist() == [False, False, True, True, False, False, True, True]
    assert dapo.informative(np.zeros(0), np.zeros(0, str)).tolist() == []


def test_overlong_penalty():
    got = dapo.overlong_penalty(np.array([0, 80, 81, 90, 100]), 100, 20, 0.5)
    assert got.tolist() == pytest.approx([0, 0, -0.025, -0.25, -0.5])
