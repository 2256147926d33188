"""Supervised fine-tuning on prompt and response pairs: the warm start. Runs on every rank under torchrun, without Ray.

Each rank reads the same files, draws the same order and keeps its data-parallel share.
"""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from hybridrl.algorithms.aggregation import Denominators
from hybridrl.data.batching import by_tokens, plan_shares
from hybridrl.data.files import read_table
from hybridrl.data.trajectories import Trajectories, jagged
from hybridrl.megatron.losses import SupervisedLoss
from hybridrl.telemetry.phases import memory_metrics
from hybridrl.telemetry.trackers import Trackers
from hybridrl.trainer import settings
from hybridrl.trainer.ppo import cost_model
from hybridrl.trainer.worker import TrainWorker

_BUDGET = "data.max_token_len_per_gpu"


def read_pairs(files: list[str], tokenizer, data, key: str) -> Trajectories:
    """Tokenised pairs. The prompt column holds chat messages or the user's text; the response ends in the end token.

    ValueError names the key or the file: missing column, nothing left, a sample over data.max_length.
    """
    prompts, responses = [], []
    for path in files:
        table = read_table(path, key)
        for column, setting in ((data.prompt_key, "data.prompt_key"), (data.response_key, "data.response_key")):
            if column not in table.column_names:
                raise ValueError(f"{path} has no column {column!r} ({setting}); it has {', '.join(table.column_names)}")
        for prompt, response in zip(
            table[data.prompt_key].to_pylist(), table[data.response_key].to_pylist(), strict=True
        ):
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            prompts.append(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
            )
            end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            responses.append(tokenizer.encode(response, add_special_tokens=False) + end)
            total = len(prompts[-1]) + len(responses[-1])
            if total > data.max_length:
                if data.truncation == "error":
                    raise ValueError(
                        f"{path}: sample {len(prompts) - 1} has {total} tokens, data.max_length={data.max_length}. "
                        "Mend: raise it, or data.truncation=right"
                    )
                responses[-1] = responses[-1][: max(1, data.max_length - len(prompts[-1]))]
    if data.train_max_samples > 0:
        prompts, responses = prompts[: data.train_max_samples], responses[: data.train_max_samples]
    if not prompts:
        raise ValueError(f"{key}: no sample in {files}")
    ids = pa.list_(pa.int32())
    table = Trajectories(pa.table({"prompt_ids": pa.array(prompts, ids), "response_ids": pa.array(responses, ids)}))
    values, offsets = table.flat("response_ids")
    return table.with_columns(response_mask=jagged(np.ones(len(values), np.int8), offsets))


def fit(resolved, tokenizer, train: Trajectories, val: Trajectories | None, tree: dict) -> str:
    """Trains and exports a Hugging Face folder; returns its path. Collective over all ranks."""
    config, role = resolved.config, resolved.actor
    data, trainer = config.data, config.trainer
    per_epoch = max(1, len(train) // data.train_batch_size)
    total = trainer.total_training_steps or trainer.total_epochs * per_epoch
    every = max(1, total // 50)  # supervised steps are short: a row for each would drown the terminal
    rank = int(os.environ.get("RANK", 0))
    threads = max(1, resolved.machine.cores // role.ranks) if resolved.machine.device == "cpu" else 4
    worker = TrainWorker(rank, settings.sft_pool(config, role, resolved.machine.device, total, threads))
    coords = worker.setup("env://" if "WORLD_SIZE" in os.environ else worker.rendezvous())
    cost = cost_model(config.model)
    trackers = None
    if rank == 0:
        trackers = Trackers(
            trainer.logger,
            trainer.default_local_dir,
            trainer.project_name,
            trainer.experiment_name,
            config_dict=tree,
            total_steps=total,
        )
    try:
        for step in range(1, total + 1):
            start = time.perf_counter()
            rows = _draw(len(train), data, step - 1, per_epoch)
            found = _step(worker, coords, train.take(rows), cost, data)
            found |= {"timing_s/step": time.perf_counter() - start, **memory_metrics("train/perf")}
            due = trainer.test_freq > 0 and step % trainer.test_freq == 0
            if val is not None and (due or step == total):
                found["val/loss"] = _evaluate(worker, coords, val, cost, data)
            if trackers and (step % every == 0 or "val/loss" in found):
                trackers.log(found, step)
        folder = _export(worker, rank, trainer.default_local_dir, total, config.model.tokenizer_path)
    finally:
        if trackers:
            trackers.finish()
    worker.close()
    return folder


def _draw(count: int, data, index: int, per_epoch: int) -> np.ndarray:
    epoch, batch = divmod(index, per_epoch)
    order = np.random.default_rng([data.seed, epoch]).permutation(count)
    return order[batch * data.train_batch_size : (batch + 1) * data.train_batch_size]


def _load(worker: TrainWorker, coords, batch: Trajectories, cost, data) -> Denominators:
    lengths = batch.lengths("prompt_ids") + batch.lengths("response_ids")
    shares = plan_shares(lengths, 1, len(batch), 1, coords.dp, cost, by_tokens(data.max_token_len_per_gpu, _BUDGET))
    share = shares[coords.dp_rank]
    worker.load_share("sft", (share, batch.take(share.rows)))
    return Denominators(float(batch.lengths("response_ids").sum()), float(len(batch)))


def _step(worker: TrainWorker, coords, batch: Trajectories, cost, data) -> dict[str, float]:
    denom = _load(worker, coords, batch, cost, data)
    result = worker.update("sft", "actor", SupervisedLoss(), [[denom]])["metrics"]
    parts = {k: v[0] for k, v in result.items()}
    summed = _sum_over_ranks({k: parts.get(k, 0.0) for k in ("loss", "entropy")}, coords)
    worker.drop_shares()
    return {f"train/{k}": v for k, v in {**summed, "grad_norm": parts["grad_norm"], "lr": parts["lr"]}.items()}


def _evaluate(worker: TrainWorker, coords, val: Trajectories, cost, data) -> float:
    denom = _load(worker, coords, val, cost, data)
    loss = worker.evaluate_loss("sft", "actor", SupervisedLoss(), denom).get("loss", 0.0)
    worker.drop_shares()
    return _sum_over_ranks({"loss": loss}, coords)["loss"]


def _sum_over_ranks(parts: dict[str, float], coords) -> dict[str, float]:
    """Parts lie on each data-parallel rank's collecting rank; the sum is known everywhere."""
    gathered = [None] * coords.world
    dist.all_gather_object(gathered, parts if coords.is_collector else dict.fromkeys(parts, 0.0))
    return {k: sum(p[k] for p in gathered) for k in parts}


def _export(worker: TrainWorker, rank: int, run_dir: str, step: int, tokenizer: str) -> str:
    """global_step_N/huggingface, whole or not there."""
    final = Path(run_dir).absolute() / f"global_step_{step}" / "huggingface"
    temporary = final.with_suffix(".tmp")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    worker.export_hf("actor", str(temporary), tokenizer)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    return str(final)
