"""A Hugging Face config.json as Megatron's TransformerConfig and the sizes that the weight layout needs."""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig

from hybridrl.config import Megatron
from hybridrl.megatron.families import family_of, head_dim
from hybridrl.weights.layout import Dims

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_hf_config(path: str, trust_remote_code: bool = False):
    """The transformers config of a folder."""
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)


def layout_dims(hf_config, tp: int) -> Dims:
    """Sizes for weights/layout.py. The vocabulary is padded to a multiple of tp; padding is zero and never counts."""
    vocab = hf_config.vocab_size
    return Dims(
        heads=hf_config.num_attention_heads,
        kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim(hf_config),
        hidden=hf_config.hidden_size,
        vocab=vocab,
        vocab_padded=math.ceil(vocab / tp) * tp,
        tied=bool(hf_config.tie_word_embeddings),
    )


def transformer_config(hf_config, megatron: Megatron, device: torch.device) -> TransformerConfig:
    """TransformerConfig for a dense decoder.

    calculate_per_token_loss switches off Megatron's own division by micro-batches and by data-parallel ranks: losses
    arrive with global denominators. Fusions that go through torch.compile or CUDA-only extensions are off on the CPU.
    """
    family, dtype, tp = family_of(hf_config), DTYPES[megatron.dtype], megatron.tensor_model_parallel_size
    cuda, virtual = device.type == "cuda", megatron.virtual_pipeline_model_parallel_size
    interleaved = virtual is not None and virtual > 1
    settings = dict(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if interleaved else None,
        sequence_parallel=bool(megatron.sequence_parallel) and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths even without experts
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not cuda,
        batch_p2p_comm=cuda and not interleaved,
        # Each direction by itself: of two stages each is the other's neighbour on both sides, and messages of both
        # directions in one exchange would be taken for one another.
        overlap_p2p_comm=interleaved,
        deallocate_pipeline_outputs=False,
    )
    settings.update(megatron.override_transformer_config)
    try:
        return TransformerConfig(**settings)
    except TypeError as error:
        raise ValueError(f"megatron.override_transformer_config: {error}") from None
