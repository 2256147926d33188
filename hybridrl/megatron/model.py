"""The models: a policy that ends in hidden states (the log-prob op applies the head) and a critic with a value head.

Legend: T packed tokens, H hidden size. Under sequence parallelism hidden states come out [T / tp, 1, H].
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns hidden states [T, 1, H] instead of logits.

    Logits of a whole pack never exist: `ops.logprob` multiplies token chunks with the output weight.
    """

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """Output weight [V / tp, H]: the embedding's when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class ValueHead(torch.nn.Module):
    """Linear(H, 1) in fp32 without bias, zero at the start (so V = 0), equal on all tensor-parallel ranks."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R] fp32."""
        return torch.nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1)


class ValueModel(GPTModel):
    """The same backbone with a value head on the last stage. Its forward, too, returns hidden states."""

    def __init__(self, *args, **kwargs):
        # Untied, so that the embedding group does not look for an output weight on the last stage.
        super().__init__(*args, **{**kwargs, "share_embeddings_and_output_weights": False})
        if self.post_process:
            del self.output_layer
            self.value_head = ValueHead(self.config.hidden_size)

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


def full_hidden(hidden: Tensor, config, grads_are_partial: bool) -> Tensor:
    """Hidden states of all tokens on every tensor-parallel rank: [T / tp or T, 1, H] -> [T, H].

    grads_are_partial: each rank's gradient covers its vocabulary shard only and must be summed over ranks (the LM
    head); otherwise all ranks hold the same whole gradient (the value head).
    """
    if config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=grads_are_partial
        )
    elif grads_are_partial:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return hidden.squeeze(1)
