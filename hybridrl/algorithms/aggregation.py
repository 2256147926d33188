"""From per-token losses to one number, with denominators of the whole mini-batch.

A loss divided by a micro-batch's own token count weighs tokens by the company they happen to be packed with. Here each
piece of a mini-batch is divided by the same global numbers, so the sum over any split (micro-batches, data-parallel
ranks) is the loss of the whole, and so is the gradient.
"""

from dataclasses import dataclass

import torch

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class Denominators:
    """What a mini-batch's sums are divided by, counted over all its micro-batches and data-parallel ranks.

    tokens: tokens that count; sequences: sequences with at least one such token; scale: loss_scale_factor, the constant
    of seq-mean-token-sum-norm (tokens; usually the largest response length), needed by that mode alone.
    """

    tokens: float
    sequences: float
    scale: float | None = None

    @staticmethod
    def of(response_mask: torch.Tensor, cu_resp: torch.Tensor, scale: float | None = None) -> "Denominators":
        """The counts of these tokens alone (mask [R], cu_resp [N + 1]). Reads two numbers from the device."""
        counts = tokens_per_sequence(response_mask, cu_resp)
        return Denominators(float(counts.sum()), float((counts > 0).sum()), scale)

    def __add__(self, other: "Denominators") -> "Denominators":
        """The counts of two disjoint pieces together."""
        assert self.scale == other.scale, f"pieces of one mini-batch have one scale, not {self.scale} and {other.scale}"
        return Denominators(self.tokens + other.tokens, self.sequences + other.sequences, self.scale)


def tokens_per_sequence(response_mask: torch.Tensor, cu_resp: torch.Tensor) -> torch.Tensor:
    """How many tokens count in each sequence: mask [R], cu_resp [N + 1] -> int64 [N]. Integer sums, hence exact."""
    ends = torch.nn.functional.pad((response_mask != 0).to(torch.int64).cumsum(0), (1, 0))[cu_resp.long()]
    return ends[1:] - ends[:-1]


def sequence_of_token(cu_resp: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The sequence that each token belongs to: cu_resp [N + 1] -> int64 [R]. num_tokens is R (spares a device read)."""
    lengths = (cu_resp[1:] - cu_resp[:-1]).long()
    rows = torch.arange(lengths.shape[0], device=cu_resp.device)
    return torch.repeat_interleave(rows, lengths, output_size=num_tokens)


def masked_sum(x: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Sum of x [R] over the tokens that count, accumulated in float64 (so that its order does not show), as float32."""
    return torch.where(response_mask != 0, x, 0).sum(dtype=torch.float64).float()


def aggregate(
    x: torch.Tensor, response_mask: torch.Tensor, cu_resp: torch.Tensor, mode: str, denom: Denominators
) -> torch.Tensor:
    """This piece's part of the mini-batch's loss: x, mask [R], cu_resp [N + 1] -> float32 scalar, differentiable in x.

    With S_i = sum of x over the counting tokens of sequence i and n_i their number (the names and formulas are verl's):

        token-mean               sum_i S_i / tokens
        token-sum                sum_i S_i
        seq-mean-token-sum       sum_i S_i / sequences
        seq-mean-token-mean      sum_i (S_i / n_i) / sequences
        seq-mean-token-sum-norm  sum_i S_i / (sequences * scale)      (Dr. GRPO, arXiv:2503.20783)

    A mini-batch in which no token counts gives 0. ValueError: unknown mode; seq-mean-token-sum-norm without a scale.
    """
    if mode == "token-mean":
        return masked_sum(x, response_mask) / max(denom.tokens, 1.0)
    if mode == "token-sum":
        return masked_sum(x, response_mask)
    sequences = max(denom.sequences, 1.0)
    if mode == "seq-mean-token-sum":
        return masked_sum(x, response_mask) / sequences
    if mode == "seq-mean-token-mean":
        # As a weight per token: no sum per sequence is needed, in the backward pass neither.
        counts = tokens_per_sequence(response_mask, cu_resp).clamp(min=1)
        return masked_sum(x / counts[sequence_of_token(cu_resp, x.shape[0])], response_mask) / sequences
    if mode == "seq-mean-token-sum-norm":
        if not denom.scale or denom.scale <= 0:
            raise ValueError(
                f"loss_agg_mode=seq-mean-token-sum-norm needs a positive loss_scale_factor, not {denom.scale}: set "
                "actor_rollout_ref.actor.loss_scale_factor, for example to data.max_response_length"
            )
        return masked_sum(x, response_mask) / (sequences * denom.scale)
    raise ValueError(f"unknown loss_agg_mode {mode!r}: it must be one of {', '.join(MODES)}")
