"""What a step's samples teach, on the driver: rollout correction, token rewards, advantages, selected tokens.

Each function reads columns of the step's batch and adds its own; formulas are in hybridrl.algorithms. They see the
whole step, so nothing in them depends on mini-batches, ranks or micro-batches.
"""

import numpy as np
import torch

from hybridrl.algorithms import advantages, correction, covariance, kl
from hybridrl.data.trajectories import Trajectories, jagged
from hybridrl.trainer.batches import StepBatches


def column(batch: Trajectories, name: str) -> torch.Tensor:
    """A per-token column, flat, float32 [R]."""
    return torch.from_numpy(batch.flat(name)[0].astype(np.float32))


def boundaries(work: StepBatches) -> torch.Tensor:
    return torch.from_numpy(work.offsets.astype(np.int32))


def correct_rollouts(work: StepBatches, settings: correction.Correction) -> dict[str, float]:
    """Decoupled rollout correction: the column rollout_is_weights and a new response_mask. Returns rollout_corr/*."""
    logprobs, rollout, mask = (column(work.batch, c) for c in ("old_logprobs", "rollout_logprobs", "response_mask"))
    found = correction.correct(settings, logprobs, rollout, mask, boundaries(work))
    if found.weights is not None:
        work.batch = work.batch.with_columns(rollout_is_weights=jagged(found.weights.numpy(), work.offsets))
    if settings.rollout_rs:
        work.replace_mask(found.mask.numpy())
    return found.metrics


def estimate(work: StepBatches, settings: dict, kl_in_reward: dict | None, kl_ctrl) -> dict[str, float]:
    """Token rewards (the score at the last token, minus KL if asked), advantages and returns, added to the batch."""
    batch, found = work.batch, {}
    mask, cu = column(batch, "response_mask"), boundaries(work)
    rewards = advantages.place_scores(torch.from_numpy(batch.scalars("score").astype(np.float32)), mask, cu)
    if kl_in_reward:
        old, ref = column(batch, "old_logprobs"), column(batch, "ref_logprobs")
        rewards, mean_kl = kl.penalize_rewards(rewards, old, ref, mask, cu, kl_in_reward["kind"], kl_ctrl.value)
        found = {"actor/reward_kl_penalty": mean_kl, "actor/reward_kl_penalty_coeff": kl_ctrl.value}
        kl_ctrl.update(mean_kl, len(batch))
    optional = ("values", "old_logprobs", "sum_pi_squared", "rollout_is_weights")
    inputs = advantages.AdvantageInputs(
        token_rewards=rewards,
        response_mask=mask,
        cu_resp=cu,
        group_ids=torch.from_numpy(np.unique(batch.scalars("uid").astype(str), return_inverse=True)[1]),
        **{name: column(batch, name) for name in optional if name in batch},
        **_rewards_of_samples(batch, settings),
        **settings["options"],
    )
    adv, returns = advantages.compute(settings["name"], inputs)
    columns = {"token_rewards": rewards, "advantages": adv, "returns": returns}
    work.batch = batch.with_columns(**{k: jagged(v.numpy(), work.offsets) for k, v in columns.items()})
    return found


def _rewards_of_samples(batch: Trajectories, settings: dict) -> dict[str, torch.Tensor]:
    """reward_baselines [N] and reward_components [K, N] with reward_weights [K], where there are such. A component that
    a sample lacks (it could not be scored) counts as 0."""
    out = {}
    if "reward_baseline" in batch:
        out["reward_baselines"] = torch.from_numpy(batch.scalars("reward_baseline").astype(np.float32))
    if keys := settings["reward_keys"]:
        if missing := [key for key in keys if key not in batch]:
            raise ValueError(
                f"algorithm.gdpo_reward_keys={keys}: the reward function returns no number {missing[0]!r}; let it"
                " return a dict with these keys beside score"
            )
        parts = [np.nan_to_num(batch.scalars(key).astype(np.float32)) for key in keys]
        out["reward_components"] = torch.from_numpy(np.stack(parts))
        out["reward_weights"] = torch.tensor(settings["reward_weights"], dtype=torch.float32)
    return out


def select_tokens(work: StepBatches, settings: dict) -> None:
    """The column `selected` of clip_cov and kl_cov, 1 at the tokens that they single out."""
    batch = work.batch
    found = covariance.token_covariance(*(column(batch, c) for c in ("advantages", "old_logprobs", "response_mask")))
    uids, samples = batch.table["uid"].to_pylist(), batch.table["sample"].to_pylist()
    keys = covariance.token_keys(uids, samples, work.offsets, settings["seed"])
    if "lower" in settings:
        chosen = covariance.select_for_clip(found, keys, settings["ratio"], settings["lower"], settings["upper"])
    else:
        chosen = covariance.select_for_kl(found, keys, settings["ratio"])
    work.batch = batch.with_columns(selected=jagged(chosen.numpy(), work.offsets))
