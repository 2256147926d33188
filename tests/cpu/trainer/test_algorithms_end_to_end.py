"""What estimators and losses need really arrives: short runs of main_ppo in one process with real Megatron and vLLM."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_end_to_end import ROOT, arguments, metrics, run, world  # noqa: F401 (world is a fixture)

# Each answer earns something; `acc` can only differ within groups whose sum is even, so that some groups teach nothing.
REWARD = """
def digits(data_source, solution_str, ground_truth, extra_info=None):
    share = sum(c.isdigit() for c in solution_str) / max(len(solution_str), 1)
    odd = sum(map(ord, solution_str)) % 2
    acc = float(odd) if int(ground_truth) % 2 == 0 else 0.0
    return {"score": share, "acc": acc, "short": 1 / (1 + len(solution_str))}
"""
LOCAL = ["trainer.executor=local", "trainer.n_gpus_per_node=1", "trainer.val_before_train=false", "data.val_files=[]"]


def train(world: Path, folder: Path, steps: int, *extra: str) -> tuple[dict, list[dict]]:  # noqa: F811
    """(metrics by step, one dict of columns a step) of a run."""
    (world / "algorithm_reward.py").write_text(REWARD)
    kept = [word for word in arguments(world, folder) if not word.startswith(("critic.", "data.val_files", "custom_"))]
    reward = f"custom_reward_function.path={world}/algorithm_reward.py", "custom_reward_function.name=digits"
    run("hybridrl.trainer.main_ppo", [*kept, *reward, *LOCAL, f"trainer.total_training_steps={steps}", *extra])
    found = [pq.read_table(folder / "rollouts" / f"step_{s + 1}.parquet").to_pydict() for s in range(steps)]
    return metrics(folder), found


def test_remax_baselines_dynamic_sampling_and_the_overlong_penalty(world, tmp_path):  # noqa: F811
    numbers, batches = train(
        world,
        tmp_path / "run",
        2,
        "algorithm.adv_estimator=remax",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=acc",
        "reward.reward_kwargs.overlong_buffer_cfg.enable=true",
        "reward.reward_kwargs.overlong_buffer_cfg.len=20",
        "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
    )
    for step, batch in enumerate(batches, 1):
        assert len(batch["uid"]) == 32 and set(batch["weight_version"]) == {step - 1}
        for i in range(0, 32, 2):
            assert batch["uid"][i] == batch["uid"][i + 1] and batch["acc"][i] != batch["acc"][i + 1]
            assert batch["reward_baseline"][i] == batch["reward_baseline"][i + 1]
        assert len(set(batch["uid"])) == 16
        m = numbers[step]
        assert m["training/num_gen_batches"] >= 2 and m["training/filter_groups/evicted_samples"] > 0
        generated = 32 * m["training/num_gen_batches"]
        dropped = m["training/filter_groups/evicted_samples"] + m["training/filter_groups/discarded_surplus_samples"]
        assert generated - dropped == 32
        assert m["timing_s/gen_max"] > 0 and m["actor/grad_norm"] > 0 and m["actor/pg_clipfrac"] == 0.0
        assert len(set(batch["reward_baseline"])) > 1
        for i in range(32):
            length = len(batch["response_ids"][i])
            assert batch["overlong_reward"][i] == pytest.approx(-max(0, length - 4) / 20, abs=1e-6)
            # reward-to-go of a score at the last token is the score everywhere
            want = [batch["score"][i] - batch["reward_baseline"][i]] * length
            assert batch["advantages"][i] == pytest.approx(want, abs=1e-5)


def test_token_baselines_rollout_correction_and_selected_tokens(world, tmp_path):  # noqa: F811
    numbers, (batch,) = train(
        world,
        tmp_path / "run",
        1,
        "algorithm.adv_estimator=optimal_token_baseline",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold=1.5",
        "actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov",
        "actor_rollout_ref.actor.policy_loss.kl_cov_ratio=0.2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    )
    squares = np.concatenate(batch["sum_pi_squared"])
    assert (squares > 0).all() and (squares <= 1 + 1e-6).all() and squares.std() > 0
    pi = np.exp(np.concatenate(batch["old_logprobs"]))
    assert (squares >= pi**2 - 1e-6).all()  # the token's own share of the sum
    weights, selected = np.concatenate(batch["rollout_is_weights"]), np.concatenate(batch["selected"])
    np.testing.assert_allclose(weights, 1.0, atol=1e-3)  # fp32 on both sides
    assert selected.sum() == int(0.2 * len(selected)) and set(selected) == {0.0, 1.0}
    assert numbers[1]["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-3)
    assert numbers[1]["rollout_corr/rollout_rs_masked_fraction"] == 0 and numbers[1]["actor/grad_norm"] > 0
    for i in range(0, 32, 2):  # the baseline of both samples at one place, by hand
        energy = [
            np.cumsum([1 - 2 * math.exp(o) + s for o, s in zip(batch["old_logprobs"][j], batch["sum_pi_squared"][j])])
            for j in (i, i + 1)
        ]
        shorter = min(map(len, energy))
        for t in range(shorter):
            baseline = sum(batch["score"][i + k] * energy[k][t] for k in (0, 1)) / (energy[0][t] + energy[1][t])
            for k in (0, 1):
                assert batch["advantages"][i + k][t] == pytest.approx(batch["score"][i + k] - baseline, abs=2e-3)
        for k in (0, 1):
            tail = batch["advantages"][i + k][shorter:]
            assert tail == pytest.approx([batch["score"][i + k]] * len(tail), abs=1e-6)


def test_own_functions_by_import_path(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'docs' / 'examples'}")
    numbers, (batch,) = train(
        world,
        tmp_path / "own",
        1,
        "algorithm.adv_estimator=own_algorithm:median_baseline",
        "actor_rollout_ref.actor.policy_loss.loss_mode=own_algorithm:soft_clip",
        "custom_reward_function.path=own_algorithm:short_and_right",
        "custom_reward_function.name=compute_score",
    )
    assert "length" in batch and numbers[1]["actor/grad_norm"] > 0
    advantages, scores = [row[0] for row in batch["advantages"]], np.array(batch["score"])
    np.testing.assert_allclose(advantages, scores - np.sort(scores)[15], atol=1e-6)


def test_gdpo_and_bypass_mode(world, tmp_path):  # noqa: F811
    numbers, (batch,) = train(
        world,
        tmp_path / "run",
        1,
        "algorithm.adv_estimator=gdpo",
        "algorithm.gdpo_reward_keys=[score,short]",
        "algorithm.gdpo_reward_weights=[1.0,0.5]",
        "algorithm.rollout_correction.bypass_mode=true",
        "algorithm.rollout_correction.loss_type=reinforce",
        "algorithm.rollout_correction.rollout_is=sequence",
        "algorithm.rollout_correction.rollout_rs=seq_mean_k1",
        "algorithm.rollout_correction.rollout_rs_threshold=1.1",
    )
    m = numbers[1]
    assert "timing_s/old_log_prob" not in m and m["actor/grad_norm"] > 0
    assert m["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-2)
    assert m["rollout_corr/rollout_rs_masked_fraction"] == 0 and m["training/rollout_logprobs_diff_max"] < 1e-4
    parts = np.zeros(32)
    for key, weight in (("score", 1.0), ("short", 0.5)):
        groups = np.array(batch[key], dtype=np.float64).reshape(16, 2)
        std = groups.std(axis=1, ddof=1, keepdims=True)
        parts += weight * ((groups - groups.mean(axis=1, keepdims=True)) / (std + 1e-6)).reshape(-1)
    lengths = [len(row) for row in batch["advantages"]]
    flat = np.repeat(parts, lengths)
    want = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.concatenate(batch["advantages"]), want, atol=1e-3)
