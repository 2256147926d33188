"""Which layers a model is made of: Transformer Engine's where it is installed, else Megatron's local ones.

The local ones come with PyTorch's packed attention and an RMSNorm that works with sequence parallelism.
"""

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from hybridrl.megatron.attention import PackedAttention
from hybridrl.megatron.families import Family

try:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine
except ImportError:  # PyTorch's own operations serve
    fused_rms_norm_affine = None


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 and rounded before the weight, as transformers' Llama and
    Qwen2 norms do; by Apex's fused kernel on CUDA where Apex is installed.

    Megatron's own fallback refuses sequence parallelism; this one marks its weight for the gradient all-reduce that
    sequence parallelism needs.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fused_rms_norm_affine is not None and x.is_cuda:
            return fused_rms_norm_affine(x, self.weight, self.weight.shape, self.eps)
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def resolve_impl(transformer_impl: str, device: torch.device) -> str:
    """auto | transformer_engine | local -> the implementation that runs. ValueError when the asked one can't."""
    if transformer_impl == "auto":
        return "transformer_engine" if device.type == "cuda" and has_transformer_engine() else "local"
    if transformer_impl == "transformer_engine" and (device.type != "cuda" or not has_transformer_engine()):
        raise ValueError(
            "actor_rollout_ref.actor.megatron.transformer_impl=transformer_engine needs a GPU and the "
            "transformer-engine package. Mend: install it, or use auto or local."
        )
    return transformer_impl


def layer_spec(family: Family, impl: str) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of one decoder layer. TE brings its own final norm; the local block is given ours by `final_norm`."""
    if impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=family.qk_norm)
    spec = get_gpt_layer_local_spec(qk_layernorm=family.qk_norm, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.self_attention.submodules.core_attention = PackedAttention
    if family.qk_norm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = RMSNorm
    return spec


def block_spec(family: Family, impl: str, num_layers: int) -> ModuleSpec | TransformerBlockSubmodules:
    """What GPTModel takes: `num_layers` (of this stage) equal layers and the final norm."""
    layer = layer_spec(family, impl)
    if impl == "transformer_engine":
        return layer
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
