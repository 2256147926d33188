"""Which tokens clip_cov and kl_cov single out (arXiv:2505.22617): those that drive the entropy down the most.

A token's covariance is (A - mean A) (log pi - mean log pi). The paper and verl take it and its largest values from
whatever batch a loss sees, so that it would depend on the split into micro-batches and on data-parallel ranks. Here the
choice is made once a step, before the updates, from the whole step's tokens with the old log-probs: those of the
current policy until the first optimizer step, and the same on every rank thereafter.
"""

import hashlib

import numpy as np
import torch


def token_keys(uids: list[str], samples: list[int], offsets: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random uint64 a response token [R] that depends on (uid, sample, place in the response, seed) alone.

    uids, samples [N]; offsets int64 [N + 1]. The same token has the same key wherever it lies in the batch.
    """
    digests = [hashlib.blake2b(f"{seed}/{s}/{u}".encode(), digest_size=8).digest() for u, s in zip(uids, samples)]
    rows = np.frombuffer(b"".join(digests), dtype="<u8")
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    with np.errstate(over="ignore"):  # SplitMix64 (Steele, Lea, Flood 2014): arithmetic modulo 2^64
        x = np.repeat(rows, np.diff(offsets)) + (places.astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def token_covariance(advantages: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(A - mean A) (log pi - mean log pi), means over the tokens that count: [R] each -> float64 [R], NaN elsewhere."""
    kept = mask != 0
    centred = [x.double() - x[kept].double().mean() for x in (advantages, logprobs)]
    return torch.where(kept, centred[0] * centred[1], torch.nan)


def select_for_clip(
    covariance: torch.Tensor, keys: np.ndarray, ratio: float, lower: float, upper: float
) -> torch.Tensor:
    """Clip-Cov: a share `ratio` of the counting tokens (at least one), drawn at random from those with a covariance
    between lower and upper (both exclusive): float64 [R] (NaN: does not count), keys [R] -> float32 [R] of 0 and 1.

    The draw takes the smallest keys, so it depends on the tokens alone and not on their order.
    """
    wanted = max(int(ratio * int((~covariance.isnan()).sum())), 1)
    inside = torch.nonzero((covariance > lower) & (covariance < upper)).squeeze(1)
    chosen = inside[torch.from_numpy(np.argsort(keys[inside.numpy()], kind="stable")[:wanted].copy())]
    return torch.zeros(covariance.shape[0]).index_fill(0, chosen, 1.0)


def select_for_kl(covariance: torch.Tensor, keys: np.ndarray, ratio: float) -> torch.Tensor:
    """KL-Cov: the share `ratio` of the counting tokens (at least one) with the largest covariance; keys break ties.
    Shapes as in select_for_clip."""
    counted = torch.nonzero(~covariance.isnan()).squeeze(1)
    wanted = max(int(ratio * counted.numel()), 1)
    order = np.lexsort((keys[counted.numpy()], -covariance[counted].numpy()))
    return torch.zeros(covariance.shape[0]).index_fill(0, counted[torch.from_numpy(order[:wanted].copy())], 1.0)
