"""A tiny random Qwen2 checkpoint, settings that fit it, and tables of prompts."""

import pyarrow as pa

from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.rollout.server import ServerSettings

VOCABULARY, EOS = 512, 2


def save_model(folder, seed: int) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         tie_word_embeddings=False, eos_token_id=EOS, bos_token_id=1, pad_token_id=0,
                         initializer_range=0.1)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def server_settings(model_path: str, **changes) -> ServerSettings:
    return ServerSettings(**dict(
        model_path=model_path, tensor_parallel_size=1, dtype="float32", max_model_len=256, max_num_seqs=64,
        max_num_batched_tokens=1024, gpu_memory_utilization=0.5, cpu_kvcache_gib=0.25, enforce_eager=None,
        enable_prefix_caching=True, enable_chunked_prefill=True, load_format="auto", seed=0) | changes)


def sampling(**changes) -> SamplingSettings:
    return SamplingSettings(**dict(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=24, seed=7) | changes)


def prompt_table(prompts: list[list[int]], n: int = 1) -> pa.Table:
    """n rows a prompt, uid "p0", "p1", ..."""
    rows = [(f"p{i}", j, ids) for i, ids in enumerate(prompts) for j in range(n)]
    return pa.table({"uid": pa.array([r[0] for r in rows]), "sample": pa.array([r[1] for r in rows], pa.int32()),
                     "prompt_ids": pa.array([r[2] for r in rows], pa.list_(pa.int32()))})
