"""A step's numbers under verl's metric names, from flat NumPy columns.

Legend: N sequences, R response tokens (flat, jagged by offsets [N+1]). Everything here is pure: no files, no clock.
`trajectories` is a `hybridrl.data.trajectories.Trajectories`; only its `table`, `lengths(column)` and `flat(column)`
are used.
"""

from math import comb, sqrt

import numpy as np

# Phases whose cost follows the response tokens; the others of PER_TOKEN_PHASES read prompt and response.
RESPONSE_PHASES = ("gen",)
PER_TOKEN_PHASES = ("gen", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")
# exp() beyond this bound says nothing more than "far off"; the same bound as verl's rollout correction.
LOG_RATIO_BOUND = 20.0


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    if values.size == 0:
        return {}
    statistics = {"mean": values.mean(), "max": values.max(), "min": values.min()}
    return {f"{name}/{statistic}": float(value) for statistic, value in statistics.items()}


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each sequence's tokens, float64 [N]; an empty sequence gives 0 and a NaN stays in its own sequence."""
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.bincount(rows, weights=np.asarray(values, dtype=np.float64), minlength=len(offsets) - 1)


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns); 1 is a perfect critic, 0 one no better than a constant."""
    returns, values = np.asarray(returns, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if returns.size < 2:
        return float("nan")
    # The constant is verl's: it keeps the number finite when all returns are equal.
    return float(1.0 - (returns - values).var(ddof=1) / (returns.var(ddof=1) + 1e-5))


def length_metrics(
    prompt_lengths: np.ndarray, response_lengths: np.ndarray, max_prompt_length: int, max_response_length: int
) -> dict[str, float]:
    """prompt_length/*, response_length/*, response_length_non_aborted/* and response/aborted_ratio (tokens, int [N]).

    A response of no tokens counts as aborted; clip_ratio is the share that reached the maximum.
    """
    if len(response_lengths) == 0:
        return {}
    alive = response_lengths[response_lengths > 0]
    out = {}
    for name, lengths, longest in (
        ("response_length", response_lengths, max_response_length),
        ("response_length_non_aborted", alive, max_response_length),
        ("prompt_length", prompt_lengths, max_prompt_length),
    ):
        out |= _spread(name, lengths)
        if lengths.size:
            out[f"{name}/clip_ratio"] = float((lengths >= longest).mean())
    out["response/aborted_ratio"] = float((response_lengths == 0).mean())
    return out


def data_metrics(trajectories, max_prompt_length: int, max_response_length: int) -> dict[str, float]:
    """critic/{score,rewards,advantages,returns,values}/*, critic/vf_explained_var and the lengths of one step.

    Columns that the table does not have yet are left out (no critic: no values). Scores and rewards are per sequence
    and skip aborted responses; advantages, returns and values are per token where response_mask is 1.
    """
    columns = set(trajectories.table.column_names)
    prompt_lengths, response_lengths = trajectories.lengths("prompt_ids"), trajectories.lengths("response_ids")
    out = {}
    alive = response_lengths > 0
    if "score" in columns:
        scores = trajectories.table.column("score").to_numpy().astype(np.float64)
        out |= _spread("critic/score", scores[alive])
    if "token_rewards" in columns:
        out |= _spread("critic/rewards", segment_sums(*trajectories.flat("token_rewards"))[alive])
    mask = trajectories.flat("response_mask")[0].astype(bool)
    tokens = {name: trajectories.flat(name)[0][mask] for name in ("advantages", "returns", "values") if name in columns}
    for name, values in tokens.items():
        out |= _spread(f"critic/{name}", values.astype(np.float64))
    if "returns" in tokens and "values" in tokens:
        out["critic/vf_explained_var"] = explained_variance(tokens["returns"], tokens["values"])
    return out | length_metrics(prompt_lengths, response_lengths, max_prompt_length, max_response_length)


def seqlen_metrics(lengths: np.ndarray, shares: list[list[int]]) -> dict[str, float]:
    """global_seqlen/*: tokens a data-parallel rank gets without balancing (equal runs of rows) and with `shares`.

    lengths int [N] are tokens of prompt and response; shares lists the row indices of each rank.
    """
    lengths = np.asarray(lengths)
    plain = [int(part.sum()) for part in np.array_split(lengths, len(shares))]
    balanced = [int(lengths[list(share)].sum()) for share in shares]
    return {
        "global_seqlen/min": min(plain),
        "global_seqlen/max": max(plain),
        "global_seqlen/minmax_diff": max(plain) - min(plain),
        "global_seqlen/balanced_min": min(balanced),
        "global_seqlen/balanced_max": max(balanced),
        "global_seqlen/mean": float(lengths.sum() / len(shares)),
    }


def timing_metrics(timings: dict[str, float], prompt_tokens: int, response_tokens: int) -> dict[str, float]:
    """timing_s/{phase} in seconds, and timing_per_token_ms/{phase} for the phases that work on tokens."""
    out = {f"timing_s/{name}": float(seconds) for name, seconds in timings.items()}
    for name in PER_TOKEN_PHASES:
        tokens = response_tokens if name in RESPONSE_PHASES else prompt_tokens + response_tokens
        if name in timings and tokens > 0:
            out[f"timing_per_token_ms/{name}"] = 1000.0 * timings[name] / tokens
    return out


def throughput_metrics(total_tokens: int, step_seconds: float, ranks: int) -> dict[str, float]:
    """perf/total_num_tokens, perf/time_per_step (s) and perf/throughput (tokens a second and rank; a GPU on CUDA)."""
    rate = total_tokens / (step_seconds * ranks) if step_seconds > 0 else 0.0
    return {
        "perf/total_num_tokens": int(total_tokens),
        "perf/time_per_step": float(step_seconds),
        "perf/throughput": float(rate),
    }


def rollout_mismatch_metrics(
    trainer_logprobs: np.ndarray, rollout_logprobs: np.ndarray, response_mask: np.ndarray, offsets: np.ndarray
) -> dict[str, float]:
    """How far the trainer's log-probs are from those vLLM sampled with, on the same tokens (float [R], offsets [N+1]).

    training/rollout_probs_diff_* compares probabilities and training/rollout_logprobs_diff_* log-probs; rollout_corr/*
    are verl's off-policy numbers with ratio = trainer / rollout: kl is E[log rollout - log trainer], k3_kl its
    non-negative estimator, ppl a sequence's exp(-mean log-prob), chi2 = E[ratio^2] - 1 of tokens and of sequences.
    Tokens that are masked or not finite on either side are left out; with none left only rollout_probs_diff_valid=0.
    """
    keep = response_mask.astype(bool) & np.isfinite(trainer_logprobs) & np.isfinite(rollout_logprobs)
    if not keep.any():
        return {"training/rollout_probs_diff_valid": 0}
    trainer_R, rollout_R = trainer_logprobs[keep].astype(np.float64), rollout_logprobs[keep].astype(np.float64)
    probs_trainer, probs_rollout = np.exp(trainer_R), np.exp(rollout_R)
    probs_diff, diff = np.abs(probs_rollout - probs_trainer), np.abs(rollout_R - trainer_R)
    out = {
        "training/rollout_probs_diff_valid": 1,
        "training/rollout_probs_diff_max": float(probs_diff.max()),
        "training/rollout_probs_diff_mean": float(probs_diff.mean()),
        "training/rollout_probs_diff_std": _std(probs_diff),
        "training/rollout_logprobs_diff_mean": float(diff.mean()),
        "training/rollout_logprobs_diff_max": float(diff.max()),
    }
    if probs_trainer.size > 1 and probs_trainer.std() > 0 and probs_rollout.std() > 0:
        correlation = float(np.corrcoef(probs_trainer, probs_rollout)[0, 1])
        out["training/rollout_actor_probs_pearson_corr"] = correlation
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[keep]
    return out | _correction_metrics(trainer_R, rollout_R, rows)


def _correction_metrics(trainer_R: np.ndarray, rollout_R: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    counts = np.bincount(rows)
    present = counts > 0
    counts = counts[present]
    trainer_log_ppl = -np.bincount(rows, weights=trainer_R)[present] / counts
    rollout_log_ppl = -np.bincount(rows, weights=rollout_R)[present] / counts
    # verl's sign: positive where the trainer is more surprised by the sequence than the engine that wrote it.
    log_ppl_diff = trainer_log_ppl - rollout_log_ppl
    log_ratio = np.clip(trainer_R - rollout_R, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    seq_log_ratio = np.clip(-log_ppl_diff * counts, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    numbers = {
        "kl": (rollout_R - trainer_R).mean(),
        "k3_kl": (np.expm1(log_ratio) - log_ratio).mean(),
        "training_ppl": np.exp(trainer_log_ppl).mean(),
        "rollout_ppl": np.exp(rollout_log_ppl).mean(),
        "training_log_ppl": trainer_log_ppl.mean(),
        "rollout_log_ppl": rollout_log_ppl.mean(),
        "log_ppl_diff": log_ppl_diff.mean(),
        "log_ppl_abs_diff": np.abs(log_ppl_diff).mean(),
        "log_ppl_diff_max": log_ppl_diff.max(),
        "log_ppl_diff_min": log_ppl_diff.min(),
        "ppl_ratio": np.exp(log_ppl_diff).mean(),
        "chi2_token": np.expm1(2.0 * log_ratio).mean(),
        "chi2_seq": np.expm1(2.0 * seq_log_ratio).mean(),
    }
    return {f"rollout_corr/{name}": float(value) for name, value in numbers.items()}


def _extreme_of_k(samples: np.ndarray, k: int, best: bool) -> tuple[float, float]:
    """Mean and standard deviation of the best (worst) of k out of the n samples, over all subsets, exactly.

    With the samples in ascending order, the i-th (from 1) is the largest of C(i-1, k-1) of the C(n, k) subsets.
    """
    ordered = np.sort(samples) if best else np.sort(samples)[::-1]
    weights = np.array([comb(i, k - 1) for i in range(len(ordered))], dtype=np.float64) / comb(len(ordered), k)
    mean = float(weights @ ordered)
    return mean, sqrt(max(float(weights @ ordered**2) - mean**2, 0.0))


def _majority_score(samples: np.ndarray, predictions: list[str]) -> float:
    """Score of the answer given most often; of equally frequent ones the first given."""
    counts: dict[str, int] = {}
    for prediction in predictions:
        counts[prediction] = counts.get(prediction, 0) + 1
    winner = max(counts, key=counts.get)
    return float(samples[predictions.index(winner)])


def _prompt_numbers(samples: np.ndarray, predictions: list[str] | None) -> dict[str, float]:
    n = len(samples)
    out = {"mean": float(samples.mean())}
    if n == 1:
        return out
    out["std"] = _std(samples)
    for k in sorted({2**i for i in range(1, n.bit_length()) if 2**i < n} | {n}):
        for word in ("best", "worst"):
            mean, std = _extreme_of_k(samples, k, best=word == "best")
            out[f"{word}@{k}/mean"], out[f"{word}@{k}/std"] = mean, std
    if predictions is not None:
        out[f"maj@{n}/mean"] = _majority_score(samples, predictions)
    return out


def validation_metrics(
    uids: list[str],
    data_sources: list[str],
    variables: dict[str, np.ndarray],
    predictions: list[str] | None = None,
) -> dict[str, float]:
    """val-core/{source}/{acc|reward}/{mean@n, best@n/mean, maj@n/mean} and val-aux/{source}/{variable}/... .

    One entry a sample: uid (equal for samples of one prompt), data source, the variables float [N] ("reward", and what
    the reward function reports, such as "acc"; NaN where it did not) and, for maj, the extracted answers. n is the
    largest number of samples a prompt of that source has. Each prompt weighs the same. best and worst of k are exact
    expectations over the subsets of the samples, where verl draws a bootstrap sample.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for row, (uid, source) in enumerate(zip(uids, data_sources, strict=True)):
        groups.setdefault(source, {}).setdefault(uid, []).append(row)
    out: dict[str, float] = {}
    for source, prompts in groups.items():
        n = max(len(rows) for rows in prompts.values())
        core = "acc" if _any_finite(variables.get("acc"), prompts) else "reward"
        for variable, column in variables.items():
            column = np.asarray(column, dtype=np.float64)
            collected: dict[str, list[float]] = {}
            for rows in prompts.values():
                rows = [row for row in rows if np.isfinite(column[row])]
                if rows:
                    answers = None if predictions is None else [predictions[row] for row in rows]
                    for name, number in _prompt_numbers(column[rows], answers).items():
                        collected.setdefault(f"{name}@{n}" if name in ("mean", "std") else name, []).append(number)
            for name, numbers in collected.items():
                kind, _, size = name.partition("/")[0].partition("@")
                is_core = variable == core and kind in ("mean", "best", "maj") and size == str(n)
                section = "val-core" if is_core else "val-aux"
                out[f"{section}/{source}/{variable}/{name}"] = float(np.mean(numbers))
    return out


def _any_finite(column: np.ndarray | None, prompts: dict[str, list[int]]) -> bool:
    return column is not None and any(np.isfinite(column[row]) for rows in prompts.values() for row in rows)
