"""The critic's loss on packed responses."""

import torch

from hybridrl.algorithms.aggregation import Denominators, aggregate, masked_sum


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    response_mask: torch.Tensor,
    cu_resp: torch.Tensor,
    denom: Denominators,
    cliprange_value: float,
    mode: str = "token-mean",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped regression to the returns, as in PPO's reference code (arXiv:2005.12729, section 3, optimisation 1).

    0.5 * aggregate(max((v - R)^2, (clip(v, v_old +- cliprange_value) - R)^2)). values [R], with gradient; old_values,
    returns, response_mask [R] float32; cu_resp [N + 1]; denom: the whole mini-batch's denominators. Returns this
    piece's part of the loss, and of critic/vf_clipfrac and critic/vpred_mean (means over tokens): summed over the
    pieces they are the whole's.
    """
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    loss_unclipped = (values - returns).square()
    loss_clipped = (clipped - returns).square()
    per_token = torch.maximum(loss_unclipped, loss_clipped)
    loss = 0.5 * aggregate(per_token, response_mask, cu_resp, mode, denom)

    def token_mean(x: torch.Tensor) -> torch.Tensor:
        return masked_sum(x.detach().float(), response_mask) / max(denom.tokens, 1.0)

    return loss, {
        "critic/vf_clipfrac": token_mean(loss_clipped > loss_unclipped),
        "critic/vpred_mean": token_mean(values),
    }
