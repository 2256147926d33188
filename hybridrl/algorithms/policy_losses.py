"""Policy losses on packed responses, found by verl's names (`actor_rollout_ref.actor.policy_loss.loss_mode`) or by
import path.

A loss gives a number a token; `policy_loss` weights, masks and adds them up with the mini-batch's denominators. So no
loss can depend on how the mini-batch was split. What needs the whole mini-batch is made beforehand and comes as a
column: see hybridrl.algorithms.covariance. Means over a sequence are fine, since no pack ever holds a part of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybridrl.algorithms import by_path
from hybridrl.algorithms.aggregation import (
    Denominators,
    aggregate,
    masked_sum,
    sequence_of_token,
    tokens_per_sequence,
)

LOG_RATIO_BOUND = 20.0
KEY = "actor_rollout_ref.actor.policy_loss.loss_mode"


@dataclass(frozen=True)
class LossOptions:
    """Numbers of single losses, named as the keys below actor_rollout_ref.actor(.policy_loss)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    ppo_kl_coef: float = 1.0
    dro_beta: float = 0.1


@dataclass(frozen=True)
class PolicyLossInputs:
    """One piece (micro-batch) of a mini-batch.

    logprobs [R], with gradient; old_logprobs, advantages, response_mask [R] float32; cu_resp [N + 1]; denom: the whole
    mini-batch's denominators; mode: how token losses become one number (aggregation.MODES). The ratio pi / pi_old is
    clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]; clip_ratio_c bounds the loss where the advantage is negative.
    rollout_is_weights [R]: factors of the token losses (rollout correction), None for 1. selected [R]: 1 at the tokens
    that hybridrl.algorithms.covariance chose, for the losses that need it. options: numbers of single losses.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor
    cu_resp: torch.Tensor
    denom: Denominators
    mode: str = "token-mean"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    rollout_is_weights: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    options: LossOptions = LossOptions()

    @property
    def log_ratio(self) -> torch.Tensor:
        """log pi - log pi_old, clamped to +-20: [R], with gradient."""
        return (self.logprobs - self.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    def clip(self, ratio: torch.Tensor) -> torch.Tensor:
        """The ratio within 1 - clip_ratio_low and 1 + clip_ratio_high."""
        return ratio.clamp(1.0 - self.clip_ratio_low, 1.0 + self.clip_ratio_high)

    def sequence_mean(self, x: torch.Tensor) -> torch.Tensor:
        """At each token the mean of x [R] over its sequence's counting tokens (0 where there are none), summed in
        float64: float32 [R], differentiable."""
        kept = torch.where(self.response_mask != 0, x, 0).double()
        sums = torch.segment_reduce(kept, "sum", offsets=self.cu_resp.long(), initial=0)
        means = sums / tokens_per_sequence(self.response_mask, self.cu_resp).clamp(min=1)
        return means[sequence_of_token(self.cu_resp, x.shape[0])].float()


# Token losses [R] and metrics [R] (means over the counting tokens are reported).
TokenLoss = tuple[torch.Tensor, dict[str, torch.Tensor]]
Formula = Callable[[PolicyLossInputs], TokenLoss]

CLIP = ("clip_ratio", "clip_ratio_low", "clip_ratio_high")


@dataclass(frozen=True)
class PolicyLoss:
    """A formula and what it takes. options: keys below actor_rollout_ref.actor that it reads (None: not declared);
    mode: the aggregation that the method prescribes, None for the configured one; needs: columns beside old log-probs;
    hidden: chosen by another key, not by loss_mode."""

    formula: Formula
    options: frozenset[str] | None = None
    mode: str | None = None
    needs: frozenset[str] = frozenset()
    hidden: bool = False


_LOSSES: dict[str, PolicyLoss] = {}


def loss(
    *names: str, options: tuple = (), mode: str | None = None, needs: tuple = (), hidden: bool = False
) -> Callable[[Formula], Formula]:
    """Declares what a formula takes (see PolicyLoss) and registers it under `names`; for a function that is found by
    import path, without names, it is optional."""

    def add(formula: Formula) -> Formula:
        formula.declared = PolicyLoss(formula, frozenset(options), mode, frozenset(needs), hidden)
        _LOSSES.update((name, formula.declared) for name in names)
        return formula

    return add


def find(name: str) -> PolicyLoss:
    """The loss of that name or import path. ValueError: there is none."""
    if by_path.is_path(name):
        formula = by_path.load(name, KEY)
        return getattr(formula, "declared", None) or PolicyLoss(formula)
    if name not in _LOSSES:
        raise ValueError(f"unknown {KEY} {name!r}: it must be one of {', '.join(names())}, or package.module:function")
    return _LOSSES[name]


def names() -> list[str]:
    """The losses' names, sorted."""
    return sorted(name for name, found in _LOSSES.items() if not found.hidden)


def policy_loss(name: str, inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This piece's part of the mini-batch's loss (float32 scalar with gradient) and of its metrics (scalars without).

    Loss and metrics are already divided by the global denominators: summed over micro-batches and data-parallel ranks
    they are the whole mini-batch's. Metrics are means over tokens. ValueError: unknown name; a function of the user's
    did not return a number a token.
    """
    found = find(name)
    per_token, metrics = found.formula(inputs)
    for what, x in {"the loss": per_token, **metrics}.items():
        if x.shape != inputs.logprobs.shape:
            raise ValueError(
                f"{KEY}={name}: {what} has shape {tuple(x.shape)}, not {tuple(inputs.logprobs.shape)}: return one"
                " number a response token, unreduced"
            )
    if inputs.rollout_is_weights is not None:
        per_token = per_token * inputs.rollout_is_weights
    mode = found.mode or inputs.mode
    total = aggregate(per_token, inputs.response_mask, inputs.cu_resp, mode, inputs.denom)
    tokens = max(inputs.denom.tokens, 1.0)
    means = {key: masked_sum(x.detach().float(), inputs.response_mask) / tokens for key, x in metrics.items()}
    return total, means


@loss("vanilla", options=(*CLIP, "clip_ratio_c"))
def vanilla(inputs: PolicyLossInputs) -> TokenLoss:
    """PPO's clipped objective (arXiv:1707.06347) with dual clip (arXiv:1912.09729).

    With rho = exp(clamp(log pi - log pi_old, -20, 20)): L = max(-A rho, -A clip(rho)), and where A < 0 at most -A c.
    Metrics: actor/pg_clipfrac (clip(rho) decides), actor/pg_clipfrac_lower (c decides), actor/ppo_kl (-log rho, nats).
    ValueError: clip_ratio_c not above 1.
    """
    if inputs.clip_ratio_c <= 1.0:
        raise ValueError(f"actor_rollout_ref.actor.clip_ratio_c={inputs.clip_ratio_c}: it must be above 1 (usually 3)")
    advantages, log_ratio = inputs.advantages, inputs.log_ratio
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * inputs.clip(ratio)
    pessimistic = torch.maximum(unclipped, clipped)
    ceiling = -advantages * inputs.clip_ratio_c
    negative = advantages < 0
    per_token = torch.where(negative, torch.minimum(pessimistic, ceiling), pessimistic)
    return per_token, {
        "actor/pg_clipfrac": clipped > unclipped,
        "actor/pg_clipfrac_lower": (pessimistic > ceiling) & negative,
        "actor/ppo_kl": -log_ratio,
    }


def _trust_masked(inputs: PolicyLossInputs, inside: torch.Tensor) -> TokenLoss:
    """-A sg(min(rho, c)) log pi at the tokens inside the trust region, 0 at the others."""
    log_ratio = inputs.log_ratio
    ratio = log_ratio.detach().exp()
    per_token = -inputs.advantages * ratio.clamp(max=inputs.clip_ratio_c) * inputs.logprobs * inside
    return per_token, {
        "actor/pg_clipfrac": ~inside,
        "actor/pg_clipfrac_lower": (ratio > inputs.clip_ratio_c) & inside,
        "actor/ppo_kl": -log_ratio,
    }


@loss("dppo_tv", options=(*CLIP, "clip_ratio_c"))
def dppo_tv(inputs: PolicyLossInputs) -> TokenLoss:
    """DPPO with the binary total variation as trust region (arXiv:2602.04879): a token drops out when the update has
    already moved its probability too far the way the advantage points.

    L = -A sg(min(rho, c)) log pi where A > 0 and pi - pi_old <= clip_ratio_high, or A <= 0 and pi_old - pi <=
    clip_ratio_low; 0 elsewhere. The clip ratios are distances of probabilities here.
    """
    moved = inputs.logprobs.detach().exp() - inputs.old_logprobs.exp()
    inside = torch.where(inputs.advantages > 0, moved <= inputs.clip_ratio_high, moved >= -inputs.clip_ratio_low)
    return _trust_masked(inputs, inside)


@loss("dppo_kl", options=(*CLIP, "clip_ratio_c"))
def dppo_kl(inputs: PolicyLossInputs) -> TokenLoss:
    """DPPO with the binary KL divergence as trust region (arXiv:2602.04879).

    As dppo_tv, with KL(Bernoulli(pi_old) || Bernoulli(pi)), nats, in place of the distance; a token that moved against
    the advantage's sign stays in. The clip ratios are bounds of that divergence here.
    """
    p, q = inputs.logprobs.detach().double().exp(), inputs.old_logprobs.double().exp()
    rest = torch.log((1 - q).clamp(min=0) + 1e-8) - torch.log((1 - p).clamp(min=0) + 1e-8)
    kl = q * (inputs.old_logprobs - inputs.logprobs.detach()).double() + (1 - q) * rest
    up = (kl <= inputs.clip_ratio_high) | (p <= q)
    down = (kl <= inputs.clip_ratio_low) | (p >= q)
    return _trust_masked(inputs, torch.where(inputs.advantages > 0, up, down))


@loss("gspo", options=CLIP, mode="seq-mean-token-mean")
def gspo(inputs: PolicyLossInputs) -> TokenLoss:
    """GSPO (arXiv:2507.18071), its token form (equation 14): PPO's clip on the sequence's ratio.

    s_t = sg(exp(mean over the sequence of log pi - log pi_old)) pi / sg(pi); L = max(-A s, -A clip(s)), the mean over
    tokens and then over sequences.
    """
    log_ratio = inputs.logprobs - inputs.old_logprobs
    sequence = inputs.sequence_mean(log_ratio.detach())
    ratio = (inputs.logprobs - inputs.logprobs.detach() + sequence).clamp(max=10.0).exp()
    unclipped, clipped = -inputs.advantages * ratio, -inputs.advantages * inputs.clip(ratio)
    return torch.maximum(unclipped, clipped), {
        "actor/pg_clipfrac": clipped > unclipped,
        "actor/ppo_kl": -log_ratio,
    }


@loss("sapo", options=("tau_pos", "tau_neg"), mode="seq-mean-token-mean")
def sapo(inputs: PolicyLossInputs) -> TokenLoss:
    """SAPO (arXiv:2511.20347): a soft gate in place of the clip, L = -A sigmoid(tau (rho - 1)) 4 / tau, with tau_pos
    where A > 0 and tau_neg elsewhere; the mean over tokens and then over sequences."""
    log_ratio = inputs.log_ratio
    tau = torch.where(inputs.advantages > 0, inputs.options.tau_pos, inputs.options.tau_neg)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1.0)) * (4.0 / tau)
    return -inputs.advantages * gate, {"actor/ppo_kl": -log_ratio}


@loss("gpg")
def gpg(inputs: PolicyLossInputs) -> TokenLoss:
    """GPG (arXiv:2504.02546): the plain policy gradient, L = -A log pi."""
    return -inputs.advantages * inputs.logprobs, {"actor/ppo_kl": -inputs.log_ratio}


@loss("reinforce", hidden=True)
def reinforce(inputs: PolicyLossInputs) -> TokenLoss:
    """REINFORCE of bypass mode (algorithm.rollout_correction.loss_type): L = -A log pi, times the importance weights
    pi / pi_rollout where rollout_is asks for them. actor/ppo_kl is -log(pi / pi_rollout)."""
    return gpg(inputs)


@loss("clip_cov", options=(*CLIP, "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"), needs=("selected",))
def clip_cov(inputs: PolicyLossInputs) -> TokenLoss:
    """Clip-Cov (arXiv:2505.22617): PPO's clip, and no gradient from the selected tokens of high covariance.

    See hybridrl.algorithms.covariance for who is selected. A selected token that PPO's clip already holds keeps its
    loss (its gradient is 0 either way). actor/pg_clipfrac: the tokens that were silenced.
    """
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    unclipped, clipped = -inputs.advantages * ratio, -inputs.advantages * inputs.clip(ratio)
    silent = (inputs.selected != 0) & ~(clipped > unclipped)
    per_token = torch.where(silent, 0, torch.maximum(unclipped, clipped))
    return per_token, {"actor/pg_clipfrac": silent, "actor/ppo_kl": -inputs.log_ratio}


@loss("kl_cov", options=("kl_cov_ratio", "ppo_kl_coef"), needs=("selected",))
def kl_cov(inputs: PolicyLossInputs) -> TokenLoss:
    """KL-Cov (arXiv:2505.22617): L = -A rho, plus ppo_kl_coef |log pi - log pi_old| at the selected tokens.

    See hybridrl.algorithms.covariance for who is selected. actor/ppo_kl is the mean of |log rho|, as in verl.
    """
    log_ratio = inputs.logprobs - inputs.old_logprobs
    penalty = torch.where(inputs.selected != 0, inputs.options.ppo_kl_coef * log_ratio.abs(), 0)
    return -inputs.advantages * log_ratio.exp() + penalty, {"actor/ppo_kl": log_ratio.abs()}


@loss("geo_mean", options=CLIP, mode="seq-mean-token-mean")
def geo_mean(inputs: PolicyLossInputs) -> TokenLoss:
    """GMPO (arXiv:2507.20673): the geometric mean of the sequence's ratios, each clipped in log space, pessimistically.

    L = -mean(A) exp(mean of l), l = sign(A) min(sign(A) log rho, sign(A) clamp(log rho, -low, high)); means over the
    sequence, then over sequences. Where rollout correction gives weights they enter by their mean over the sequence.
    """
    log_ratio = inputs.logprobs - inputs.old_logprobs
    clamped = log_ratio.clamp(-inputs.clip_ratio_low, inputs.clip_ratio_high)
    sign = inputs.advantages.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * clamped)
    per_token = -inputs.sequence_mean(inputs.advantages) * inputs.sequence_mean(pessimistic).exp()
    clipped = log_ratio != clamped
    return per_token, {
        "actor/pg_clipfrac": clipped & (inputs.advantages > 0),
        "actor/pg_clipfrac_lower": clipped & (inputs.advantages < 0),
        "actor/ppo_kl": -log_ratio,
    }


@loss("dro", options=("dro_beta",))
def dro(inputs: PolicyLossInputs) -> TokenLoss:
    """DRO's policy term (arXiv:2405.19107) with the old policy as anchor: L = -(A log pi - beta / 2 (log rho)^2)."""
    log_ratio = inputs.logprobs - inputs.old_logprobs
    per_token = -inputs.advantages * inputs.logprobs + 0.5 * inputs.options.dro_beta * log_ratio.square()
    return per_token, {"actor/ppo_kl": -log_ratio}


@loss("cispo", options=CLIP)
def cispo(inputs: PolicyLossInputs) -> TokenLoss:
    """CISPO (arXiv:2506.13585): every token keeps its gradient, its weight is clipped: L = -A sg(clip(rho)) log pi."""
    log_ratio = inputs.log_ratio
    ratio = log_ratio.detach().exp()
    clipped = inputs.clip(ratio)
    per_token = -inputs.advantages * clipped * inputs.logprobs
    return per_token, {"actor/pg_clipfrac": clipped != ratio, "actor/ppo_kl": -log_ratio}
