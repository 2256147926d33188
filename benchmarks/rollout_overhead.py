"""What our rollout server costs over bare vLLM: the same requests through the fleet (Ray) and through LLM.generate.

    python benchmarks/rollout_overhead.py --prompts 32 --samples 8 --tokens 64 --out benchmarks/results/overhead.json

Engines run one after the other, never two at once, with the same arguments and environment. Bare vLLM is timed twice:
with its engine in a process of its own (as ours and as LLM's default) and inside the calling process. Each prints
seconds (median and best of the repeats after one warm-up), generated tokens a second, and ours divided by bare (the
bests, which other work on the machine disturbs least; the load average is in the output).
Without --model a random two-layer Qwen2 is made.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from hybridrl.rollout.fleet import RolloutFleet
from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.rollout.server import ServerSettings, base_environment, engine_arguments


def make_model(folder: str) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.1, eos_token_id=2)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def hardware() -> dict[str, str | int]:
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": ", ".join(gpus) or "none", "torch": torch.__version__,
            "load_average": os.getloadavg()[0]}


def requests(args) -> tuple[pa.Table, SamplingSettings]:
    rows = [(f"p{i}", j, np.random.default_rng(i).integers(3, 500, args.prompt_tokens).tolist())
            for i in range(args.prompts) for j in range(args.samples)]
    uids, samples, prompts = zip(*rows)
    table = pa.table({"uid": uids, "sample": pa.array(samples, pa.int32()),
                      "prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    return table, SamplingSettings(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=args.tokens, seed=1,
                                   ignore_eos=True)


def settings(args) -> ServerSettings:
    length = args.prompt_tokens + args.tokens
    return ServerSettings(
        model_path=args.model, tensor_parallel_size=1, dtype=args.dtype, max_model_len=length,
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=max(8192, length), gpu_memory_utilization=0.5,
        cpu_kvcache_gib=0.5, enforce_eager=None, enable_prefix_caching=True, enable_chunked_prefill=True,
        load_format="auto", seed=0, omp_threads=args.omp_threads)


def timed(generate, start_s: float, first_s: float, repeats: int, tokens: int) -> dict:
    seconds = []
    for step in range(1, repeats + 1):
        began = time.perf_counter()
        generate(step)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    return {"start_s": start_s, "first_s": first_s, "seconds": seconds, "median_s": median, "best_s": min(seconds),
            "tokens_per_s": tokens / median}


def ours(args) -> dict:
    import ray

    table, sampling = requests(args)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    fleet = RolloutFleet(settings(args))
    try:
        began = time.perf_counter()
        fleet.start()
        started = time.perf_counter()
        fleet.generate(table, sampling, 0)
        return timed(lambda step: fleet.generate(table, sampling, step), started - began,
                     time.perf_counter() - started, args.repeats, len(table) * args.tokens)
    finally:
        fleet.shutdown()
        ray.shutdown()


def bare(args) -> dict:
    began = time.perf_counter()
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    table, sampling = requests(args)
    rows = table.to_pylist()
    prompts = [TokensPrompt(prompt_token_ids=row["prompt_ids"]) for row in rows]

    def generate(step):
        params = [sampling.vllm_params(row["uid"], row["sample"], step) for row in rows]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    llm = LLM(**engine_arguments(settings(args)))
    started = time.perf_counter()
    generate(0)
    return timed(generate, started - began, time.perf_counter() - started, args.repeats, len(table) * args.tokens)


def child(mode: str, args, environment: dict[str, str]) -> dict:
    """Run one measurement in a process of its own and read its line of JSON (vLLM logs to stdout, too)."""
    command = [sys.executable, __file__, "--mode", mode, "--model", args.model]
    for name in ("prompts", "samples", "prompt_tokens", "tokens", "repeats", "dtype", "omp_threads", "max_num_seqs"):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    output = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a Hugging Face folder")
    parser.add_argument("--out", default="", help="where the numbers go as JSON")
    parser.add_argument("--dtype", default="float32")
    for name, value in (("prompts", 32), ("samples", 8), ("prompt-tokens", 64), ("tokens", 64), ("repeats", 5),
                        ("omp-threads", 1), ("max-num-seqs", 256)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--mode", choices=("all", "ours", "bare"), default="all", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.mode != "all":
        print(json.dumps({"ours": ours, "bare": bare}[args.mode](args)))
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or make_model(folder)
        environment = base_environment(settings(args))
        if not torch.cuda.is_available():
            environment["TORCHDYNAMO_DISABLE"] = "1"  # as the server does on CPU
        results = {
            "ours": child("ours", args, {}),
            "bare": child("bare", args, environment),
            "bare_in_process": child("bare", args, environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
        }
    report = {"hardware": hardware(), "arguments": {k: v for k, v in vars(args).items() if k not in ("mode", "out")},
              "results": results,
              "ours_over_bare": results["ours"]["best_s"] / results["bare"]["best_s"],
              "ours_over_bare_in_process": results["ours"]["best_s"] / results["bare_in_process"]["best_s"]}
    for name, result in results.items():
        print(f"{name:16} start {result['start_s']:5.1f} s  first {result['first_s']:5.2f} s  median "
              f"{result['median_s']:6.3f} s  best {result['best_s']:6.3f} s  {result['tokens_per_s']:9,.0f} tok/s")
    print(f"ours / bare {report['ours_over_bare']:.3f}, "
          f"ours / bare in process {report['ours_over_bare_in_process']:.3f}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
