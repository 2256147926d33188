"""Causal attention over packed sequences with PyTorch's own kernels, as Megatron's core_attention.

On CUDA `torch.nn.attention.varlen.varlen_attn`; on the CPU one scaled-dot-product call a sequence, so that no T x T
mask is ever made. Legend: T packed tokens, N sequences, A local query heads, G local key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older PyTorch: the CPU path serves
    varlen_attn = None


class PackedAttention(MegatronModule):
    """softmax(q k^T / sqrt(D)) v inside each sequence, causal. No dropout, no bias.

    Forward takes query [T, A, D], key and value [T, G, D] and PackedSeqParams with cu_seqlens_q [N+1] int32;
    returns [T, A * D]. Nothing is communicated: heads are already split over tensor-parallel ranks.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__(config=config)
        assert attention_type == "self" and config.context_parallel_size == 1
        self.head_dim = config.kv_channels

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None, "hybridrl packs every batch"
        cu = packed_seq_params.cu_seqlens_q
        if query.is_cuda and query.dtype != torch.float32:  # PyTorch's packed kernel is for half precision
            out = _varlen(query, key, value, cu, packed_seq_params.max_seqlen_q)
        else:
            bounds = cu.tolist()
            parts = [_one(query[a:b], key[a:b], value[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
            out = torch.cat(parts)
        return out.reshape(out.shape[0], -1)


def _one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if group > 1:  # varlen_attn wants equal head counts
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), cu, cu, longest, longest, window_size=(-1, 0)
    )
