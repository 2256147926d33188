"""Ranks for tests of parallel code, tiny checkpoints and samples.

Ranks are forked from a server that has imported torch, Megatron and transformers once: a job of two ranks then costs
its own work, not ten seconds of imports, and still has processes of its own.
"""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import wait

import numpy as np
import pyarrow as pa

VOCABULARY = 515  # odd, so that TP pads it


def run_ranks(function, world: int, *args, timeout: float = 240.0) -> list:
    """Calls function(rank, world, init_method, *args) in `world` new processes; the results in rank order.

    `function` is a module's own function. AssertionError with the rank's traceback when one raises or dies.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hybridrl.trainer.worker", "transformers.models.qwen2.modeling_qwen2"])
    with tempfile.TemporaryDirectory() as folder:
        init, pipes, ranks = f"file://{folder}/store", [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(there, function, rank, world, init, args), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            ranks.append(process)
        try:
            return _results(pipes, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _results(pipes: list, deadline: float) -> list:
    import torch

    found, left = {}, list(pipes)
    while left:
        ready = wait(left, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[pipes.index(p) for p in left]} did not end in time"
        for pipe in ready:
            try:
                ok, payload = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {pipes.index(pipe)} died") from None
            assert ok, f"rank {pipes.index(pipe)}:\n{payload}"
            found[pipes.index(pipe)] = torch.load(io.BytesIO(payload), weights_only=False)
            left.remove(pipe)
    return [found[rank] for rank in range(len(pipes))]


def _rank(pipe, function, rank: int, world: int, init: str, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        out = io.BytesIO()
        torch.save(function(rank, world, init, *args), out)
        pipe.send((True, out.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


# Families under test: transformers' class, and what its config adds to the common small one.
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 48}),
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                           "attention_factor": 1.0, "original_max_position_embeddings": 16}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 64}),
}


def save_model(folder, tied: bool, layers: int = 2, seed: int = 0, family: str = "qwen2", **changes) -> str:
    """A random checkpoint in fp32 in which biases and norms matter, too."""
    import torch
    import transformers

    generator = torch.Generator().manual_seed(seed)
    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**dict(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied) | more | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name:
                param.copy_(1.0 + 0.3 * noise)
            else:
                param.copy_(noise * (0.3 if "bias" in name else 0.08))
    model.save_pretrained(folder)
    return str(folder)


def samples(lengths: list[tuple[int, int]], seed: int = 0):
    """Random tokens with (prompt, response) lengths, a mask with holes and every column of the losses."""
    from hybridrl.data.trajectories import Trajectories, jagged

    random = np.random.default_rng(seed)
    prompts = [random.integers(0, VOCABULARY, n).tolist() for n, _ in lengths]
    responses = [random.integers(0, VOCABULARY, n).tolist() for _, n in lengths]
    offsets = np.concatenate([[0], np.cumsum([n for _, n in lengths])])
    total, ids = int(offsets[-1]), pa.list_(pa.int32())
    table = Trajectories(pa.table({"prompt_ids": pa.array(prompts, ids), "response_ids": pa.array(responses, ids)}))

    def floats(mean: float, std: float):
        return jagged((mean + std * random.standard_normal(total)).astype(np.float32), offsets)

    return table.with_columns(
        response_mask=jagged((random.random(total) > 0.25).astype(np.int8), offsets),
        old_logprobs=floats(-6.2, 0.4), ref_logprobs=floats(-6.2, 0.4), advantages=floats(0.0, 1.0),
        values=floats(0.0, 0.5), returns=floats(0.0, 1.0))


LOSS_COLUMNS = ("old_logprobs", "ref_logprobs", "advantages", "values", "returns")


def join(rank: int, world: int, init: str, tp: int = 1, pp: int = 1):
    """(coordinates, device) of a rank that joined its groups on the CPU."""
    from hybridrl.megatron import parallel, platform

    device = platform.activate("cpu")
    return parallel.initialize(rank, world, device, tp, pp, 42, init), device


def engine_settings(folder: str, role: str = "policy", tp: int = 1, pp: int = 1, sp: bool = False,
                    dtype: str = "float32", distributed: bool = True, optim: dict | None = None,
                    virtual: int | None = None, **changes):
    """EngineSettings; `optim` None is a forward-only engine."""
    from hybridrl.config import Megatron, Optim
    from hybridrl.megatron.engine import EngineSettings

    megatron = Megatron(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp,
                        dtype=dtype, use_distributed_optimizer=distributed,
                        virtual_pipeline_model_parallel_size=virtual)
    return EngineSettings(role, folder, megatron, None if optim is None else Optim(**optim), **changes)


def checkpoint_tensors(folder: str) -> dict:
    """All tensors of a folder's safetensors files by name."""
    from safetensors.torch import load_file

    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found.update(load_file(os.path.join(folder, name)))
    return found


def shards_of(engine, value) -> list:
    """(names in a Hugging Face checkpoint, kind, tensor) of each parameter; `value` picks what of it."""
    found = []
    for name, param, entry in engine.entries():
        names, kind = (entry.hf_names, entry.kind) if entry else ((name,), "copy")
        found.append((names, kind, value(param).detach().clone()))
    return found


def whole_tensors(ranks: list[dict], pick, dims) -> dict:
    """Full tensors from the ranks' shards. Asserts that copies of one thing on several ranks are equal bit for bit."""
    import torch

    from hybridrl.weights import layout

    places: dict[tuple, dict] = {}
    for result in ranks:
        for names, kind, tensor in pick(result):
            shards = places.setdefault((names, kind), {})
            known = shards.setdefault(result["coords"].tp_rank, tensor)
            assert torch.equal(known, tensor), f"{names}: data-parallel ranks or stages differ"
    found = {}
    for (names, kind), shards in places.items():
        tensors = [shards[i] for i in sorted(shards)]
        if kind == "copy":
            assert all(torch.equal(tensors[0], t) for t in tensors), f"{names}: tensor-parallel ranks differ"
        found.update(layout.to_hf(layout.Entry(kind, names), tensors, dims))
    return found


def close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((actual[name].double() - tensor.double()).norm() / tensor.double().norm())
        assert error < tolerance, f"{name}: relative error {error:.1e}"
