"""Metrics under verl's names, against numbers worked out by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest

from hybridrl.data.trajectories import Trajectories
from hybridrl.telemetry import metrics


def _trajectories(**columns):
    base = {
        "uid": ["a", "a", "b"],
        "prompt_ids": [[1, 2], [1, 2], [1, 2, 3, 4]],
        "response_ids": [[5, 6], [], [7, 8, 9]],
        "response_mask": [[1, 0], [], [1, 1, 1]],
        "score": [1.0, 9.0, 0.0],
    }
    return Trajectories(pa.table(base | columns))


def test_scores_and_rewards_skip_aborted_and_tokens_follow_the_mask():
    trajectories = _trajectories(
        token_rewards=[[0.25, 0.5], [], [0.0, -0.5, 0.25]],
        advantages=[[1.0, 100.0], [], [2.0, 3.0, -2.0]],
    )
    out = metrics.data_metrics(trajectories, max_prompt_length=4, max_response_length=3)
    assert (out["critic/score/mean"], out["critic/score/max"], out["critic/score/min"]) == (0.5, 1.0, 0.0)
    assert (out["critic/rewards/mean"], out["critic/rewards/max"], out["critic/rewards/min"]) == (0.25, 0.75, -0.25)
    assert (out["critic/advantages/mean"], out["critic/advantages/max"]) == (1.0, 3.0)
    assert not any(name.startswith(("critic/values", "critic/returns", "critic/vf")) for name in out)


def test_lengths():
    out = metrics.data_metrics(_trajectories(), max_prompt_length=4, max_response_length=3)
    assert out["response_length/mean"] == pytest.approx(5 / 3)
    assert (out["response_length/max"], out["response_length/min"]) == (3.0, 0.0)
    assert out["response_length/clip_ratio"] == pytest.approx(1 / 3)
    assert out["response_length_non_aborted/mean"] == 2.5
    assert out["response_length_non_aborted/clip_ratio"] == 0.5
    assert out["response/aborted_ratio"] == pytest.approx(1 / 3)
    assert out["prompt_length/mean"] == pytest.approx(8 / 3)
    assert out["prompt_length/clip_ratio"] == pytest.approx(1 / 3)


def test_explained_variance():
    trajectories = _trajectories(
        values=[[0.0, 50.0], [], [1.0, 2.0, 3.0]],
        returns=[[0.0, -50.0], [], [2.0, 2.0, 4.0]],
    )
    out = metrics.data_metrics(trajectories, 4, 3)
    # returns 0 2 2 4: variance 8/3; differences 0 1 0 1: variance 1/3.
    assert out["critic/vf_explained_var"] == pytest.approx(1 - (1 / 3) / (8 / 3 + 1e-5))
    assert out["critic/values/mean"] == 1.5
    assert math.isnan(metrics.explained_variance(np.ones(1), np.ones(1)))


def test_nan_stays_in_its_own_sequence():
    sums = metrics.segment_sums(np.array([1.0, np.nan, 3.0, 4.0]), np.array([0, 2, 2, 4]))
    assert math.isnan(sums[0]) and sums[1:].tolist() == [0.0, 7.0]


def test_sequence_lengths_before_and_after_balancing():
    out = metrics.seqlen_metrics(np.array([10, 20, 1, 3]), [[0, 2, 3], [1]])
    assert out == {
        "global_seqlen/min": 4,
        "global_seqlen/max": 30,
        "global_seqlen/minmax_diff": 26,
        "global_seqlen/balanced_min": 14,
        "global_seqlen/balanced_max": 20,
        "global_seqlen/mean": 17.0,
    }


def test_timing_and_throughput():
    timings = {"step": 10.0, "gen": 4.0, "update_actor": 3.0, "gen/sleep": 1.0}
    out = metrics.timing_metrics(timings, prompt_tokens=300, response_tokens=200)
    assert out["timing_s/gen"] == 4.0 and out["timing_s/gen/sleep"] == 1.0
    assert out["timing_per_token_ms/gen"] == pytest.approx(20.0)
    assert out["timing_per_token_ms/update_actor"] == pytest.approx(6.0)
    assert "timing_per_token_ms/step" not in out
    assert metrics.throughput_metrics(500, 10.0, ranks=2)["perf/throughput"] == 25.0
    assert metrics.throughput_metrics(500, 0.0, ranks=2)["perf/throughput"] == 0.0


def test_rollout_mismatch_by_hand():
    trainer = np.log(np.array([0.5, 0.25, 0.9, 0.5], dtype=np.float32))
    rollout = np.log(np.array([0.4, 0.25, 0.1, 0.5], dtype=np.float32))
    mask = np.array([1, 1, 0, 1], dtype=np.int8)
    out = metrics.rollout_mismatch_metrics(trainer, rollout, mask, np.array([0, 2, 4]))
    assert out["training/rollout_probs_diff_valid"] == 1
    assert out["training/rollout_probs_diff_max"] == pytest.approx(0.1, abs=1e-6)
    assert out["training/rollout_probs_diff_mean"] == pytest.approx(0.1 / 3, abs=1e-6)
    ratio = math.log(0.5 / 0.4)
    assert out["training/rollout_logprobs_diff_max"] == pytest.approx(ratio, abs=1e-6)
    assert out["rollout_corr/kl"] == pytest.approx(-ratio / 3, abs=1e-6)
    assert out["rollout_corr/k3_kl"] == pytest.approx((1.25 - 1 - ratio) / 3, abs=1e-6)
    assert out["rollout_corr/training_ppl"] == pytest.approx((1 / math.sqrt(0.125) + 2) / 2, rel=1e-5)
    assert out["rollout_corr/rollout_ppl"] == pytest.approx((1 / math.sqrt(0.1) + 2) / 2, rel=1e-5)
    assert out["rollout_corr/log_ppl_diff"] == pytest.approx(-ratio / 4, abs=1e-6)
    assert out["rollout_corr/chi2_token"] == pytest.approx((1.25**2 - 1) / 3, abs=1e-6)
    assert out["rollout_corr/chi2_seq"] == pytest.approx((1.25**2 - 1) / 2, abs=1e-5)


def test_rollout_mismatch_without_usable_tokens():
    nothing = metrics.rollout_mismatch_metrics(np.array([np.nan]), np.array([-1.0]), np.ones(1), np.array([0, 1]))
    assert nothing == {"training/rollout_probs_diff_valid": 0}


def test_equal_log_probs_differ_by_nothing():
    logprobs = np.array([-0.1, -2.0, -0.5])
    out = metrics.rollout_mismatch_metrics(logprobs, logprobs.copy(), np.ones(3), np.array([0, 1, 3]))
    assert out["training/rollout_logprobs_diff_max"] == 0 and out["rollout_corr/k3_kl"] == 0
    assert out["training/rollout_actor_probs_pearson_corr"] == pytest.approx(1.0)
    assert out["rollout_corr/ppl_ratio"] == 1.0


def test_validation_of_one_sample_a_prompt():
    out = metrics.validation_metrics(
        ["a", "b", "c"],
        ["arithmetic", "arithmetic", "gsm8k"],
        {"reward": np.array([1.0, 0.1, 0.5]), "acc": np.array([1.0, 0.0, np.nan])},
    )
    assert out["val-core/arithmetic/acc/mean@1"] == 0.5
    assert out["val-aux/arithmetic/reward/mean@1"] == pytest.approx(0.55)
    # gsm8k's reward function reports no acc: its reward is the number that counts.
    assert out["val-core/gsm8k/reward/mean@1"] == 0.5
    assert not any("best" in name or "std" in name for name in out)


def test_validation_of_several_samples():
    uids = ["a"] * 4 + ["b"] * 4
    acc = np.array([1, 0, 0, 0, 1, 1, 0, 1], dtype=float)
    answers = ["7", "8", "8", "9", "3", "3", "4", "3"]
    out = metrics.validation_metrics(uids, ["x"] * 8, {"acc": acc}, answers)
    assert out["val-core/x/acc/mean@4"] == 0.5
    assert out["val-core/x/acc/best@4/mean"] == 1.0
    # Of the 6 pairs, 3 hold a's one right answer; all 6 hold one of b's.
    assert out["val-aux/x/acc/best@2/mean"] == pytest.approx((3 / 6 + 1) / 2)
    assert out["val-aux/x/acc/worst@2/mean"] == pytest.approx((0 + 3 / 6) / 2)
    assert out["val-core/x/acc/maj@4/mean"] == 0.5
    assert out["val-aux/x/acc/std@4"] == pytest.approx(0.5)


def test_majority_tie_goes_to_the_first_answer():
    out = metrics.validation_metrics(["a", "a"], ["x", "x"], {"acc": np.array([0.0, 1.0])}, ["1", "2"])
    assert out["val-core/x/acc/maj@2/mean"] == 0.0
