"""The model families that hybridrl trains: what differs between them in one table, keyed by Hugging Face's model_type.

A dense decoder of the Llama kind (RMSNorm, rotary embedding, grouped-query attention, gated SiLU) needs one entry.
Imports neither Megatron nor (before frequencies are asked for) torch, so that checks can run before any worker starts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """What a family adds to the common dense decoder."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}

# Rotary types whose frequencies transformers changes with the length of the batch.
_BY_LENGTH = ("dynamic", "longrope")


def family_of(hf_config) -> Family:
    """The table entry for a transformers config.

    ValueError naming the known families for any other, and for a variant of a known one that the model here does not
    have: biases, another activation, a sliding window that is in use, rotary types without fixed frequencies.
    """
    key, kind = "actor_rollout_ref.model.path", hf_config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"{key}: model_type {kind!r} is not supported yet. "
            f"Supported: {', '.join(sorted(FAMILIES))}. A dense family is one entry in hybridrl/megatron/families.py."
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, name, False):
            raise ValueError(f"{key}: {name}=true in a {kind} config.json is not supported yet: use one without")
    if hf_config.hidden_act != "silu":
        raise ValueError(f"{key}: hidden_act {hf_config.hidden_act!r} in config.json is not supported yet: only silu")
    _refuse_window(hf_config, key)
    _rope(hf_config)
    return FAMILIES[kind]


def _refuse_window(hf_config, key: str) -> None:
    """Attention here sees the whole sequence: the same thing as long as no sequence is longer than the window."""
    window, context = getattr(hf_config, "sliding_window", None), hf_config.max_position_embeddings
    if window is not None and getattr(hf_config, "use_sliding_window", True) and window < context:
        raise ValueError(
            f"{key}: sliding_window={window} in config.json is shorter than max_position_embeddings={context}, and "
            f"sliding windows are not supported yet. Mend: set max_position_embeddings to {window} there, since up to "
            "that length the window changes nothing"
        )
    if other := set(getattr(hf_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{key}: layer_types {sorted(other)} in config.json are not supported yet; use another model")


def head_dim(hf_config) -> int:
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def _rope(hf_config) -> tuple[str, float]:
    """(rotary type, base). transformers 5 keeps them in rope_parameters, transformers 4 in attributes of their own."""
    parameters = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    key = "actor_rollout_ref.model.path"
    what = f"{key}: rope_type {kind!r} in the model's config.json is not supported yet"
    mend = "Mend: take it out; up to the context that the model had before it, the model does without"
    if kind in _BY_LENGTH:
        raise ValueError(f"{what}: its frequencies depend on the length of the batch. {mend}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{key}: partial_rotary_factor in the model's config.json is not supported yet: only 1 is")
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"{what} and transformers does not know it")
        if (factor := ROPE_INIT_FUNCTIONS[kind](hf_config, "cpu")[1]) != 1.0:
            raise ValueError(f"{what}: it scales attention by {factor:.6g}. {mend}")
    return kind, float(parameters.get("rope_theta") or hf_config.rope_theta)


def inverse_frequencies(hf_config) -> "Tensor":
    """Rotary inverse frequencies [head_dim / 2] fp32, as transformers has them. ValueError for an unsupported type."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, base = _rope(hf_config)
    if kind == "default":
        dim = head_dim(hf_config)
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return ROPE_INIT_FUNCTIONS[kind](hf_config, "cpu")[0].float()
