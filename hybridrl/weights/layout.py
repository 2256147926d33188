"""How each parameter of a dense decoder lies in Megatron's ranks and in a Hugging Face checkpoint.

One `Entry` a Megatron parameter: its Hugging Face names and how tensor parallelism cuts it. `from_hf` reads exactly the
bytes that a rank needs, `to_hf` turns the tensor-parallel shards back into full tensors. Pure: no torch.distributed.

Legend: A query heads, G key/value heads, D head size, F feed-forward size, H hidden size, V vocabulary, tp ranks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dims:
    """The sizes that the cuts depend on. `vocab` is the true size; `vocab_padded` is divisible by tp."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    vocab_padded: int
    tied: bool


@dataclass(frozen=True)
class Entry:
    """kind: qkv | gate_up | row (columns split) | vocab (rows split, padded) | copy."""

    kind: str
    hf_names: tuple[str, ...]


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

# Both layer implementations: the local spec names norms beside the linears, Transformer Engine inside them.
_IN_LAYER = {
    "input_layernorm.weight": ("copy", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": ("copy", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": ("qkv", tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.q_layernorm.weight": ("copy", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("copy", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("row", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": ("copy", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("copy", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("row", ("mlp.down_proj.weight",)),
}
_QK_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
_OUTSIDE = {
    "embedding.word_embeddings.weight": ("vocab", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": ("copy", ("model.norm.weight",)),
    "output_layer.weight": ("vocab", ("lm_head.weight",)),
}


def entry_of(name: str, layer_offset: int, dims: Dims) -> Entry | None:
    """The entry of a Megatron parameter (name on its stage, whose first layer is `layer_offset`).

    None for a value head, which no Hugging Face backbone has. ValueError naming any other unknown parameter.
    """
    if name.startswith("value_head."):
        return None
    found = _LAYER.fullmatch(name)
    if found and found[2] in _IN_LAYER:
        kind, suffixes = _IN_LAYER[found[2]]
        return Entry(kind, tuple(f"model.layers.{int(found[1]) + layer_offset}.{s}" for s in suffixes))
    if name in _OUTSIDE:
        kind, names = _OUTSIDE[name]
        if name == "output_layer.weight" and dims.tied:  # the copy that a last pipeline stage keeps
            names = ("model.embed_tokens.weight",)
        return Entry(kind, names)
    raise ValueError(f"parameter {name!r} has no place in a Hugging Face checkpoint: extend hybridrl/weights/layout.py")


def refuse_extra(
    names: Iterable[str], layers: int, qkv_bias: bool, qk_norm: bool, backbone: bool, where: str
) -> None:
    """ValueError naming tensors of a checkpoint that no parameter of the model takes: more layers than its config says,
    biases, adapters. They would be lost without a word.

    `backbone`: only the backbone is used (a critic), and whatever head the checkpoint has is left aside.
    """
    known = {name for _, names in _OUTSIDE.values() for name in names}
    for parameter, (_, suffixes) in _IN_LAYER.items():
        if (parameter.endswith("qkv.bias") and not qkv_bias) or (parameter in _QK_NORMS and not qk_norm):
            continue
        known.update(f"model.layers.{i}.{suffix}" for i in range(layers) for suffix in suffixes)
    extra = sorted(n for n in names if n not in known and (n.startswith("model.") or not backbone))
    extra = [n for n in extra if not n.endswith("rotary_emb.inv_freq")]  # a constant that old checkpoints carry along
    if extra:
        raise ValueError(
            f"{where} holds {len(extra)} tensors that a model of its config.json ({layers} layers) does not "
            f"have, such as {extra[0]!r}. Mend: give the folder its own config.json and weights."
        )


class Reader(Protocol):
    """What `from_hf` reads from: `reader[name]` is sliceable, and `reader.shape(name)` is known without reading."""

    def __getitem__(self, name: str) -> Any: ...


def from_hf(entry: Entry, reader: Reader, dims: Dims, tp: int, rank: int) -> Tensor:
    """The shard of tensor-parallel rank `rank` of `tp`, reading only its bytes."""
    sources = [reader[name] for name in entry.hf_names]
    if entry.kind == "copy":
        return sources[0][:]
    if entry.kind == "row":
        cols = reader.shape(entry.hf_names[0])[1] // tp
        return sources[0][:, rank * cols : (rank + 1) * cols]
    if entry.kind == "gate_up":
        rows = reader.shape(entry.hf_names[0])[0] // tp
        return torch.cat([s[rank * rows : (rank + 1) * rows] for s in sources])
    if entry.kind == "vocab":
        rows = dims.vocab_padded // tp
        part = sources[0][rank * rows : min((rank + 1) * rows, dims.vocab)]
        return part if part.shape[0] == rows else torch.cat([part, part.new_zeros(rows - part.shape[0], part.shape[1])])
    assert entry.kind == "qkv"
    groups = dims.kv_heads // tp
    per_group = dims.heads // dims.kv_heads
    counts = (per_group, 1, 1)  # heads of q, k, v in a group
    parts = []
    for source, heads in zip(sources, counts, strict=True):
        rows = groups * heads * dims.head_dim
        part = source[rank * rows : (rank + 1) * rows]
        parts.append(part.reshape(groups, heads * dims.head_dim, *part.shape[1:]))
    out = torch.cat(parts, dim=1)
    return out.reshape(-1, *out.shape[2:])


def to_hf(entry: Entry, shards: list[Tensor], dims: Dims) -> dict[str, Tensor]:
    """Full Hugging Face tensors from the shards of all tensor-parallel ranks, in rank order."""
    if entry.kind == "copy":
        return {entry.hf_names[0]: shards[0]}
    if entry.kind == "row":
        return {entry.hf_names[0]: torch.cat(shards, dim=1)}
    if entry.kind == "gate_up":
        halves = [s.chunk(2) for s in shards]
        return {name: torch.cat([h[i] for h in halves]) for i, name in enumerate(entry.hf_names)}
    if entry.kind == "vocab":
        return {entry.hf_names[0]: torch.cat(shards)[: dims.vocab]}
    assert entry.kind == "qkv"
    per_group = dims.heads // dims.kv_heads
    full = torch.cat(shards)
    grouped = full.reshape(dims.kv_heads, (per_group + 2) * dims.head_dim, *full.shape[1:])
    sizes = [per_group * dims.head_dim, dims.head_dim, dims.head_dim]
    parts = grouped.split(sizes, dim=1)
    return {
        name: part.reshape(-1, *full.shape[1:]).contiguous() for name, part in zip(entry.hf_names, parts, strict=True)
    }
