"""Distance to the reference policy: per-token estimators of the KL divergence, and what sets its coefficient.

The estimators are Schulman's (http://joschu.net/blog/kl-approx.html): for tokens drawn from pi, with the log-ratio
d = log pi - log pi_ref, k1 = d, k2 = d^2 / 2 and k3 = exp(-d) - 1 + d.
"""

import torch

from hybridrl.algorithms.aggregation import masked_sum, sequence_of_token, tokens_per_sequence

_ALIASES = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimate of KL(pi || pi_ref), nats: logprobs, ref_logprobs [R] -> [R], differentiable in logprobs.

    kind is verl's: kl or k1, abs (|d|), mse or k2, low_var_kl or k3 (d clamped to +-20, the result to +-10). With a `+`
    at the end the value stays and the gradient becomes that of k2, whose expectation is the gradient of the true KL,
    which neither k1's nor k3's is (arXiv:2506.09477). ValueError: unknown kind.
    """
    straight_through = kind.endswith("+")
    base = _ALIASES.get(kind.removesuffix("+"))
    d = logprobs - ref_logprobs
    if base == "k1":
        value = d
    elif base == "abs":
        value = d.abs()
    elif base == "k2":
        value = 0.5 * d.square()
    elif base == "k3":
        d_clamped = d.clamp(-20.0, 20.0)
        value = (torch.exp(-d_clamped) - 1.0 + d_clamped).clamp(-10.0, 10.0)
    else:
        raise ValueError(f"unknown KL estimator {kind!r}: it must be one of {', '.join(_ALIASES)}, `+` after it or not")
    if not straight_through:
        return value
    k2 = 0.5 * d.square()
    return value.detach() + (k2 - k2.detach())


def penalize_rewards(
    token_rewards: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    response_mask: torch.Tensor,
    cu_resp: torch.Tensor,
    kind: str,
    coefficient: float,
) -> tuple[torch.Tensor, float]:
    """KL in the reward (arXiv:1909.08593, equation 2): r - coefficient * KL at the tokens that count.

    All tensors [R] but cu_resp [N + 1]. Returns (rewards [R], the batch's KL in nats: the mean over sequences of the
    mean over tokens, which is what the controller is fed and verl logs as actor/reward_kl_penalty).
    """
    kl = torch.where(response_mask != 0, kl_penalty(logprobs, ref_logprobs, kind), 0).detach()
    counts = tokens_per_sequence(response_mask, cu_resp)
    per_token = kl / counts.clamp(min=1)[sequence_of_token(cu_resp, kl.shape[0])]
    mean = masked_sum(per_token, response_mask) / (counts > 0).sum().clamp(min=1)
    return token_rewards - coefficient * kl, float(mean)


class FixedKLController:
    """A constant coefficient, `value`. Nothing is restored on resume: the configuration decides."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict:
        """The state to save with a checkpoint."""
        return {"type": "fixed"}

    def load_state_dict(self, state: dict) -> None:
        """Takes nothing from `state`."""


class AdaptiveKLController:
    """A coefficient, `value`, that steers the measured KL to a target (Ziegler et al., arXiv:1909.08593, section 2.2).

    target_kl: nats; horizon: the number of samples over which a 20 % error changes the coefficient by about 20 %.
    """

    def __init__(self, kl_coef: float, target_kl: float, horizon: int):
        if target_kl <= 0:
            raise ValueError(f"algorithm.kl_ctrl.target_kl={target_kl}: an adaptive controller needs a positive target")
        if horizon <= 0:
            raise ValueError(f"algorithm.kl_ctrl.horizon={horizon}: an adaptive controller needs a positive horizon")
        self.value, self.target_kl, self.horizon = kl_coef, target_kl, horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """current_kl: nats, the mean of the last batch; n_steps: its number of samples."""
        error = min(max(current_kl / self.target_kl - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon

    def state_dict(self) -> dict:
        """The state to save with a checkpoint."""
        return {"type": "adaptive", "value": self.value}

    def load_state_dict(self, state: dict) -> None:
        """Restores the coefficient; keeps its own where the checkpoint was made with a fixed one."""
        self.value = state.get("value", self.value)


def make_kl_controller(
    type: str, kl_coef: float, horizon: int, target_kl: float
) -> FixedKLController | AdaptiveKLController:
    """The controller that algorithm.kl_ctrl describes. ValueError: unknown type, impossible target or horizon."""
    if type == "fixed":
        return FixedKLController(kl_coef)
    if type == "adaptive":
        return AdaptiveKLController(kl_coef, target_kl, horizon)
    raise ValueError(f"algorithm.kl_ctrl.type={type!r}: it must be fixed or adaptive")
