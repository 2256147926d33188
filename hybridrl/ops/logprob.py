"""Log-probabilities and entropy of chosen tokens straight from hidden states; logits exist one token chunk at a time.

With z = hidden @ weight.T / temperature over the true vocabulary, p = softmax(z) and target t:

    logprob = z_t - log sum_j exp(z_j)          entropy H = log sum_j exp(z_j) - sum_j p_j z_j
    d/dz_j (g_l logprob + g_H H) = g_l (1[j = t] - p_j) - g_H p_j (log p_j + H)

Backward computes each chunk's logits again instead of keeping them. Everything after the product is fp32.
Legend: R response tokens, H hidden size, V/tp rows of this rank's vocabulary shard, C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024  # fixed, so that equal calls are cut alike and give equal bits


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of the vocabulary: rows [start, start + weight rows); rows at or past `vocab` are padding."""

    start: int
    vocab: int
    group: dist.ProcessGroup | None = None

    def reduce(self, x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x


def from_hidden(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, temperature: float, shard: VocabShard,
    squares: bool = False,
) -> tuple[Tensor, ...]:
    """(logprob [R] fp32, entropy [R] fp32) of `targets_R` (int64, global token ids), both differentiable.

    With `squares` a third: sum_j p_j^2 over the vocabulary, [R] fp32, not differentiable.

    Collective over shard.group in forward. The gradient to `hidden_RH` is this shard's part only: the caller sums over
    the group (Megatron's copy/gather regions do). ValueError for a shape or a temperature that makes no sense.
    """
    if hidden_RH.dim() != 2 or weight_VH.dim() != 2 or hidden_RH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"logprob: hidden {tuple(hidden_RH.shape)} and weight {tuple(weight_VH.shape)} don't match")
    if targets_R.shape != hidden_RH.shape[:1]:
        raise ValueError(f"logprob: {targets_R.shape[0]} targets for {hidden_RH.shape[0]} hidden states")
    if not temperature > 0:
        raise ValueError(f"logprob: temperature must be positive, got {temperature}")
    outputs = _LogProb.apply(hidden_RH, weight_VH, targets_R, float(temperature), shard, squares)
    return outputs if squares else outputs[:2]


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: float, shard: VocabShard) -> Tensor:
    """fp32 logits [C, V/tp] of a chunk, padding at -inf."""
    logits = torch.matmul(hidden, weight.t()).float()
    if temperature != 1.0:
        logits.div_(temperature)
    real = shard.vocab - shard.start
    if real < logits.shape[1]:
        logits[:, max(real, 0) :] = float("-inf")
    return logits


def _local_targets(targets: Tensor, rows: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """(row within this shard, clamped; whether the target lies here)."""
    local = targets - shard.start
    here = (local >= 0) & (local < rows)
    return local.clamp(0, rows - 1), here


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, shard, squares):
        count = hidden.shape[0]
        logprob = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy, tops, log_sums = (torch.empty_like(logprob) for _ in range(3))
        collisions = torch.empty_like(logprob) if squares else None
        for a in range(0, count, CHUNK_TOKENS):
            part = slice(a, min(a + CHUNK_TOKENS, count))
            logits = _chunk_logits(hidden[part], weight, temperature, shard)
            top = shard.reduce(logits.amax(dim=1), dist.ReduceOp.MAX)
            # From here on logits stand relative to the largest: adding it back would round small differences away.
            logits.sub_(top[:, None])
            local, here = _local_targets(targets[part], weight.shape[0], shard)
            target = logits.gather(1, local[:, None]).squeeze(1).masked_fill(~here, 0.0)
            exp = logits.exp()
            # -inf * 0 would be nan: padding has weight zero, so any finite logit serves there.
            weighted = (exp * logits.clamp_min_(torch.finfo(torch.float32).min)).sum(dim=1)
            sums = shard.reduce(torch.stack([exp.sum(dim=1), weighted, target]))
            tops[part], log_sums[part] = top, sums[0].log()
            logprob[part] = sums[2] - log_sums[part]
            entropy[part] = log_sums[part] - sums[1] / sums[0]
            if squares:
                collisions[part] = shard.reduce(exp.square_().sum(dim=1)) / sums[0].square()
        ctx.save_for_backward(hidden, weight, targets, tops, log_sums, entropy)
        ctx.temperature, ctx.shard = temperature, shard
        if squares:
            ctx.mark_non_differentiable(collisions)
        return logprob, entropy, collisions

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy, _):
        hidden, weight, targets, tops, log_sums, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for a in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(a, min(a + CHUNK_TOKENS, hidden.shape[0]))
            logits = _chunk_logits(hidden[part], weight, ctx.temperature, ctx.shard)
            logp = logits.sub_(tops[part, None]).sub_(log_sums[part, None])
            p = logp.exp()
            g_l, g_h = grad_logprob[part, None], grad_entropy[part, None]
            # Where p is 0 in fp32 (below e^-104, padding at -inf) any finite value serves, if g_h cannot overflow it.
            inner = logp.clamp_min_(-1e4).add_(entropy[part, None]).mul_(g_h).add_(g_l)
            grad = p.mul_(inner).neg_()
            local, here = _local_targets(targets[part], weight.shape[0], ctx.shard)
            grad.scatter_add_(1, local[:, None], torch.where(here[:, None], g_l, torch.zeros_like(g_l)))
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = torch.matmul(grad, weight)
            grad_weight.add_(torch.matmul(grad.t(), hidden[part]))
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def reference(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The oracle: float64, all logits at once, one shard without padding. Differentiable."""
    logits = hidden_RH.double() @ weight_VH.double().t() / temperature
    logp = torch.log_softmax(logits, dim=-1)
    return logp.gather(1, targets_R[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
