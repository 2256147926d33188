"""Rollout correction: the trainer's policy and the one that wrote the tokens (vLLM's) are not the same numbers.

Importance weights w = pi / pi_rollout, truncated (TIS) or cut to a band (IcePop, arXiv:2510.18855), and rejection of
tokens or sequences that are too far off (MIS), as in "When Speed Kills Stability" (Liu, Li et al. 2025,
https://richardli.xyz/rl-collapse). Decoupled: pi is the old policy, weights and mask are made once a step from the
whole batch, so estimators and denominators see the final mask. Bypass: pi_rollout takes the place of pi_old and pi is
the current policy, so weights and mask are made in the loss, a micro-batch at a time; both are per token or per
sequence, never more, so they don't depend on the split. Log-ratios are clamped to +-20.
"""

import math
from dataclasses import dataclass

import torch

from hybridrl.algorithms.aggregation import Denominators, masked_sum, sequence_of_token, tokens_per_sequence

BOUND = 20.0
KEY = "algorithm.rollout_correction"
RS_OPTIONS = tuple(
    [f"{level}_{kind}" for level in ("token", "seq_sum", "seq_mean") for kind in ("k1", "k2", "k3")]
    + ["seq_max_k2", "seq_max_k3"]
)


@dataclass(frozen=True)
class Correction:
    """The keys below algorithm.rollout_correction. rollout_is: token, sequence or None; rollout_is_threshold: "C" (TIS)
    or "lo_hi" (IcePop); rollout_rs: options of RS_OPTIONS with commas between, or None; rollout_rs_threshold: a bound
    for all of them, or one each."""

    rollout_is: str | None
    rollout_is_threshold: str
    rollout_is_batch_normalize: bool
    rollout_rs: str | None
    rollout_rs_threshold: str | None


@dataclass(frozen=True)
class Corrected:
    """weights: float32 [R], 0 where masked, or None without rollout_is; mask: float32 [R] after rejection."""

    weights: torch.Tensor | None
    mask: torch.Tensor
    metrics: dict[str, float]


def is_bounds(threshold: str) -> tuple[float | None, float]:
    """(lower or None, upper) of rollout_is_threshold. ValueError: neither "C" with C >= 1 nor "lo_hi", 0 < lo <= hi."""
    key = f"{KEY}.rollout_is_threshold={threshold}"
    lower, upper = _numbers(threshold, key)
    if lower is None and upper < 1:
        raise ValueError(
            f"{key}: a truncation below 1 shrinks every sample; two bounds are written \"'0.5_5.0'\", quoted and with"
            " the point, for YAML reads 0.5_5 as 0.55"
        )
    return lower, upper


def rs_bounds(options: str, threshold: str | None) -> list[tuple[str, float, float]]:
    """(option, lower, upper) for each option of rollout_rs, as bounds of its statistic.

    k1 options bound the ratio ("lo_hi", or "C" for 1 / C to C): log lo and log hi of -log r. The others have an upper
    bound of the divergence. ValueError: unknown option, a threshold missing or of another form.
    """
    names = list(dict.fromkeys(name.strip() for name in options.split(",")))
    if wrong := [name for name in names if name not in RS_OPTIONS]:
        raise ValueError(f"{KEY}.rollout_rs={options}: {wrong[0]!r} is none of {', '.join(RS_OPTIONS)}")
    if threshold is None:
        raise ValueError(f"{KEY}.rollout_rs={options} needs {KEY}.rollout_rs_threshold")
    key = f"{KEY}.rollout_rs_threshold={threshold}"
    given = [part.strip() for part in threshold.split(",")]
    if len(given) not in (1, len(names)):
        raise ValueError(f"{key}: one threshold, or one for each of {len(names)} options")
    found = []
    for name, part in zip(names, given * len(names) if len(given) == 1 else given, strict=True):
        lower, upper = _numbers(part, key)
        if name.endswith("k1"):
            found.append((name, math.log(1 / upper if lower is None else lower), math.log(upper)))
        elif lower is not None:
            raise ValueError(f"{key}: {name} has an upper bound only; lo_hi belongs to the k1 options")
        else:
            found.append((name, -math.inf, upper))
    return found


def _numbers(text: str, key: str) -> tuple[float | None, float]:
    try:
        parts = [float(part) for part in text.split("_")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or not all(0 < p < math.inf for p in parts) or parts[0] > parts[-1]:
        raise ValueError(f"{key}: a positive number, or two as lo_hi with lo at most hi")
    return (None if len(parts) == 1 else parts[0]), parts[-1]


def sequence_sum(x: torch.Tensor, mask: torch.Tensor, cu_resp: torch.Tensor) -> torch.Tensor:
    """Sum over each sequence's counting tokens: x, mask [R] -> float64 [N]."""
    kept = torch.where(mask != 0, x, 0).double()
    return torch.segment_reduce(kept, "sum", offsets=cu_resp.long(), initial=0)


def raw_weights(log_ratio: torch.Tensor, mask: torch.Tensor, cu_resp: torch.Tensor, level: str) -> torch.Tensor:
    """pi / pi_rollout of each token or of its whole sequence (the product): log_ratio, mask [R] -> float64 [R]."""
    x = log_ratio.double()
    if level == "sequence":
        x = sequence_sum(log_ratio, mask, cu_resp)[sequence_of_token(cu_resp, mask.shape[0])]
    return torch.where(mask != 0, x.clamp(-BOUND, BOUND).exp(), 0)


def truncate(raw: torch.Tensor, threshold: str) -> torch.Tensor:
    """TIS: at most C. IcePop: 0 outside [lo, hi]."""
    lower, upper = is_bounds(threshold)
    return raw.clamp(max=upper) if lower is None else torch.where((raw >= lower) & (raw <= upper), raw, 0)


def statistic(name: str, log_ratio: torch.Tensor, mask: torch.Tensor, cu_resp: torch.Tensor) -> torch.Tensor:
    """What an option of rollout_rs bounds, at each token: float64 [R]; k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d with
    d = log pi - log pi_rollout, of the token, or summed, averaged or the largest over its sequence."""
    d = torch.where(mask != 0, log_ratio, 0).double().clamp(-BOUND, BOUND)
    level, kind = name.rsplit("_", 1)
    token = {"k1": lambda: -d, "k2": lambda: 0.5 * d.square(), "k3": lambda: torch.expm1(d) - d}[kind]()
    if level == "token":
        return token
    if level == "seq_max":  # k2 and k3 are never negative, masked tokens' are 0
        of_sequence = torch.segment_reduce(token, "max", offsets=cu_resp.long(), initial=0)
    else:
        of_sequence = torch.segment_reduce(token, "sum", offsets=cu_resp.long(), initial=0)
        if level == "seq_mean":
            of_sequence = of_sequence / tokens_per_sequence(mask, cu_resp).clamp(min=1)
    return of_sequence[sequence_of_token(cu_resp, mask.shape[0])]


def correct(
    correction: Correction,
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    cu_resp: torch.Tensor,
) -> Corrected:
    """Weights and mask of a whole batch (decoupled), with rollout_corr/* metrics: all [R] but cu_resp [N + 1].

    With rollout_is_batch_normalize weights are divided by their mean (over tokens, or over sequences). Weights are
    those of all counting tokens, rejected or not; rejection goes into the mask.
    """
    log_ratio = torch.where(mask != 0, logprobs - rollout_logprobs, 0)
    weights, metrics = None, {}
    if correction.rollout_is:
        raw = raw_weights(log_ratio, mask, cu_resp, correction.rollout_is)
        weights = truncate(raw, correction.rollout_is_threshold)
        metrics = _is_metrics(raw, weights, mask, cu_resp, correction.rollout_is_threshold)
        if correction.rollout_is_batch_normalize:
            counts = tokens_per_sequence(mask, cu_resp)
            means = sequence_sum(weights, mask, cu_resp) / counts.clamp(min=1)
            whole = weights[mask != 0] if correction.rollout_is == "token" else means[counts > 0]
            factor = float(whole.mean()) if whole.numel() else 1.0
            metrics["rollout_is_batch_norm_factor"] = factor = factor if factor > 1e-8 else 1.0
            weights = weights / factor
        weights = weights.float()
    kept = mask
    if correction.rollout_rs:
        kept, found = _reject(correction, log_ratio, mask, cu_resp)
        metrics |= found
    return Corrected(weights, kept, {f"rollout_corr/{name}": value for name, value in metrics.items()})


def _reject(correction: Correction, log_ratio: torch.Tensor, mask: torch.Tensor, cu_resp: torch.Tensor):
    """(mask after every option of rollout_rs, metrics)."""
    kept, metrics, counting = mask != 0, {}, mask != 0
    sequences = max(int((tokens_per_sequence(mask, cu_resp) > 0).sum()), 1)
    for name, lower, upper in rs_bounds(correction.rollout_rs, correction.rollout_rs_threshold):
        x = statistic(name, log_ratio, mask, cu_resp)
        passed = (x >= lower) & (x <= upper)
        kept = kept & passed
        metrics |= {f"rollout_rs_{name}_{k}": v for k, v in _spread(x[counting]).items()}
        metrics[f"rollout_rs_{name}_masked_fraction"] = _share(~passed, counting)
        hit = tokens_per_sequence(counting & ~passed, cu_resp) > 0
        metrics[f"rollout_rs_{name}_seq_masked_fraction"] = float(hit.sum()) / sequences
    metrics["rollout_rs_masked_fraction"] = _share(~kept, counting)
    hit = tokens_per_sequence(counting & ~kept, cu_resp) > 0
    metrics["rollout_rs_seq_masked_fraction"] = float(hit.sum()) / sequences
    return kept.to(mask.dtype), metrics


def _is_metrics(raw, weights, mask, cu_resp, threshold: str) -> dict[str, float]:
    """verl's rollout_is_* numbers: spread of the weights as applied, share of raw ones beyond the bounds, effective
    sample size as a share of the tokens."""
    counting = mask != 0
    lower, upper = is_bounds(threshold)
    low = 1 / upper if lower is None else lower
    applied, counts = weights[counting], tokens_per_sequence(mask, cu_resp)
    metrics = {f"rollout_is_{k}": v for k, v in _spread(applied).items()}
    metrics["rollout_is_ratio_fraction_high"] = _share(raw > upper, counting)
    metrics["rollout_is_ratio_fraction_low"] = _share(raw < low, counting)
    if lower is not None:
        metrics["rollout_is_oob_ratio"] = _share((raw < lower) | (raw > upper), counting)
    square = float(applied.square().mean()) if applied.numel() else 0.0
    metrics["rollout_is_eff_sample_size"] = float(applied.mean()) ** 2 / square if square > 0 else 0.0
    means = (sequence_sum(weights, mask, cu_resp) / counts.clamp(min=1))[counts > 0]
    metrics |= {f"rollout_is_seq_{k}": v for k, v in _spread(means).items()}
    if means.numel():
        metrics["rollout_is_seq_max_deviation"] = float((means - 1).abs().max())
    return metrics


def _spread(x: torch.Tensor) -> dict[str, float]:
    if not x.numel():
        return {}
    return {"mean": float(x.mean()), "max": float(x.max()), "min": float(x.min()), "std": float(x.std(correction=0))}


def _share(x: torch.Tensor, counting: torch.Tensor) -> float:
    return float((x & counting).sum()) / max(int(counting.sum()), 1)


def correct_live(
    correction: Correction,
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    cu_resp: torch.Tensor,
    denom: Denominators,
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, torch.Tensor]]:
    """Bypass mode, in the loss: (weights [R] or None, mask [R], metrics as parts of the mini-batch's token means).

    logprobs are the current policy's. Denominators stay the mini-batch's, rejected tokens included: how many will be
    rejected is known only after every micro-batch's forward. No gradient flows into weights or mask.
    """
    log_ratio = torch.where(mask != 0, logprobs.detach() - rollout_logprobs, 0)
    weights, kept, found = None, mask, {}
    if correction.rollout_is:
        raw = raw_weights(log_ratio, mask, cu_resp, correction.rollout_is)
        weights = truncate(raw, correction.rollout_is_threshold).float()
        found["rollout_is_mean"] = weights
    if correction.rollout_rs:
        for name, lower, upper in rs_bounds(correction.rollout_rs, correction.rollout_rs_threshold):
            x = statistic(name, log_ratio, mask, cu_resp)
            kept = kept * ((x >= lower) & (x <= upper)).to(mask.dtype)
        found["rollout_rs_masked_fraction"] = (kept == 0).float()
    tokens = max(denom.tokens, 1.0)
    return weights, kept, {f"rollout_corr/{k}": masked_sum(v, mask) / tokens for k, v in found.items()}
