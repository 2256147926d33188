"""Shards and full tensors: where each row goes, there and back, and what is refused."""

import numpy as np
import pytest
import torch

from hybridrl.weights import layout
from hybridrl.weights.layout import Dims, Entry

HEADS, KV, HEAD_DIM, HIDDEN, FFN, VOCAB = 8, 4, 2, 6, 12, 9


def dims(tp: int, vocab: int = VOCAB, tied: bool = False) -> Dims:
    return Dims(HEADS, KV, HEAD_DIM, HIDDEN, vocab, -(-vocab // tp) * tp, tied)


class Memory:
    """What from_hf reads from: tensors by name."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> list[int]:
        return list(self.tensors[name].shape)


def checkpoint() -> dict[str, torch.Tensor]:
    """Every tensor of one layer, each value unlike any other."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN),
              "model.norm.weight": (HIDDEN,)}
    layer = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
             "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM), "mlp.gate_proj.weight": (FFN, HIDDEN),
             "mlp.up_proj.weight": (FFN, HIDDEN), "mlp.down_proj.weight": (HIDDEN, FFN)}
    for name, heads in (("q", HEADS), ("k", KV), ("v", KV)):
        layer[f"self_attn.{name}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
        layer[f"self_attn.{name}_proj.bias"] = (heads * HEAD_DIM,)
    shapes |= {f"model.layers.3.{k}": v for k, v in layer.items()}
    found, at = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = torch.arange(at, at + size, dtype=torch.float32).reshape(shape)
        at += size
    return found


PARAMETERS = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"] + [
    f"decoder.layers.1.{x}" for x in (
        "input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight", "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight")]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip(tp):
    """All parameters of a stage whose first layer is 2: shards of every rank put together are the file's tensors."""
    source, size, found = checkpoint(), dims(tp), {}
    for name in PARAMETERS:
        entry = layout.entry_of(name, 2, size)
        shards = [layout.from_hf(entry, Memory(source), size, tp, rank) for rank in range(tp)]
        assert len({s.shape for s in shards}) == 1, "ranks hold equal shapes"
        if entry.kind != "copy":
            assert sum(s.numel() for s in shards) >= sum(source[n].numel() for n in entry.hf_names)
        found.update(layout.to_hf(entry, shards, size))
    assert found.keys() == source.keys()
    assert all(torch.equal(found[k], source[k]) for k in source)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_query_key_value_lie_by_group(tp):
    """Megatron's rows of linear_qkv: for each key/value head its query heads, then key, then value."""
    source, size = checkpoint(), dims(tp)
    entry = layout.entry_of("decoder.layers.3.self_attention.linear_qkv.weight", 0, size)
    q, k, v = (source[n].reshape(-1, HEAD_DIM, HIDDEN) for n in entry.hf_names)
    for rank in range(tp):
        expected = []
        for group in range(rank * KV // tp, (rank + 1) * KV // tp):
            expected += [q[2 * group], q[2 * group + 1], k[group], v[group]]
        assert torch.equal(layout.from_hf(entry, Memory(source), size, tp, rank), torch.cat(expected))


def test_gate_and_up_of_a_rank_lie_together():
    source, size = checkpoint(), dims(2)
    entry = layout.entry_of("decoder.layers.3.mlp.linear_fc1.weight", 0, size)
    gate, up = (source[n] for n in entry.hf_names)
    assert entry.hf_names[0].endswith("gate_proj.weight")
    for rank in (0, 1):
        rows = slice(rank * FFN // 2, (rank + 1) * FFN // 2)
        assert torch.equal(layout.from_hf(entry, Memory(source), size, 2, rank), torch.cat([gate[rows], up[rows]]))


@pytest.mark.parametrize("vocab,tp", [(9, 2), (9, 4), (5, 4), (8, 4), (1, 2)])
def test_vocabulary_is_padded_with_zeros(vocab, tp):
    """Also where the last ranks hold nothing but padding."""
    weight = torch.rand(vocab, HIDDEN) + 1
    size, entry = dims(tp, vocab), Entry("vocab", ("w",))
    shards = [layout.from_hf(entry, Memory({"w": weight}), size, tp, rank) for rank in range(tp)]
    whole = torch.cat(shards)
    assert whole.shape == (size.vocab_padded, HIDDEN) and size.vocab_padded % tp == 0
    assert torch.equal(whole[:vocab], weight) and not whole[vocab:].any()
    assert torch.equal(layout.to_hf(entry, shards, size)["w"], weight)


@pytest.mark.parametrize("vocab,tp", [(9, 4), (5, 4)])
def test_vocabulary_padding_from_a_file(tmp_path, vocab, tp):
    """safetensors' slices behave at the end of the vocabulary as tensors' do."""
    from safetensors.torch import save_file

    from hybridrl.weights.huggingface import HfReader

    weight = torch.rand(vocab, HIDDEN)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    size, entry = dims(tp, vocab), Entry("vocab", ("w",))
    shards = [layout.from_hf(entry, HfReader(str(tmp_path)), size, tp, rank) for rank in range(tp)]
    assert torch.equal(layout.to_hf(entry, shards, size)["w"], weight)


def test_names():
    size = dims(1)
    entry = layout.entry_of("decoder.layers.4.mlp.linear_fc2.weight", 10, size)
    assert entry == Entry("row", ("model.layers.14.mlp.down_proj.weight",))
    assert layout.entry_of("output_layer.weight", 0, size).hf_names == ("lm_head.weight",)
    tied = layout.entry_of("output_layer.weight", 0, dims(1, tied=True))
    assert tied.hf_names == ("model.embed_tokens.weight",), "a last stage's copy of the tied embedding"
    assert layout.entry_of("value_head.weight", 0, size) is None
    inside = layout.entry_of("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", 0, size)
    assert inside.hf_names == ("model.layers.0.post_attention_layernorm.weight",), "Transformer Engine's name"


@pytest.mark.parametrize("name", [
    "decoder.layers.0.mlp.router.weight", "decoder.layers.x.mlp.linear_fc2.weight", "something.weight",
    "prefix.decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.self_attention.linear_proj.bias"])
def test_unknown_parameter_is_refused(name):
    with pytest.raises(ValueError, match="has no place in a Hugging Face checkpoint") as error:
        layout.entry_of(name, 0, dims(1))
    assert repr(name) in str(error.value)
