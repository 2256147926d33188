"""The model families that hybridrl trains: what differs between them in one table, keyed by Hugging Face's model_type.

A dense decoder of the Llama kind (RMSNorm, rotary embedding, grouped-query attention, gated SiLU) needs one entry.
Imports neither Megatron nor torch, so that checks can run before any worker starts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a family adds to the common dense decoder."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "qwen2": Family(qkv_bias=True),
}


def family_of(hf_config) -> Family:
    """The table entry for a transformers config. ValueError naming the known families for any other."""
    try:
        return FAMILIES[hf_config.model_type]
    except KeyError:
        raise ValueError(
            f"actor_rollout_ref.model.path: model_type {hf_config.model_type!r} is not supported yet. "
            f"Supported: {', '.join(sorted(FAMILIES))}. A dense family is one entry in hybridrl/megatron/families.py."
        ) from None


def head_dim(hf_config) -> int:
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def rope_theta(hf_config) -> float:
    """The rotary base. transformers 5 keeps it in rope_parameters, transformers 4 in an attribute of its own."""
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} in the model's config.json is not supported yet: only 'default' is.")
    return float(parameters.get("rope_theta") or hf_config.rope_theta)
