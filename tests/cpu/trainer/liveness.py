"""Runs main_ppo's and main_sft's own code up to where processes begin, and writes down all that crosses that edge.

Real: loading, rules, plan, data sets, loop, batches, losses' settings, advantages, checkpoints, trackers. Stand-ins
that record what they are told: the pools of training ranks, the rollout fleet, the reward processes, the report. What
the ranks would build is taken one step further, into the arguments of Megatron's own configuration classes.
"""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hybridrl.config import ConfigError, Megatron, PPOConfig, SFTConfig
from hybridrl.configuration import build, check, detect_machine, plan_rows, resolve
from hybridrl.data.trajectories import Trajectories


def write_inputs(folder) -> None:
    """Model folder, prompts for PPO, pairs for supervised training."""
    from hybridrl.data import tiny_model
    from hybridrl.data.preprocess import arithmetic
    from hybridrl.data.preprocess.rows import write_rows

    write_rows(arithmetic.make_demonstrations(60, 3, 0.5, 1), folder / "pairs.parquet")
    arguments = ["--out", str(folder / "model"), "--data", str(folder / "pairs.parquet")]
    with contextlib.redirect_stdout(io.StringIO()):
        tiny_model.make_checkpoint(tiny_model.parse(arguments))
    shutil.copytree(folder / "model", folder / "model2")
    for name, count in (("train", 13), ("train2", 11), ("val", 3), ("val2", 4)):
        prompts = [[{"role": "user", "content": f"{name} {'1+' * (i % 5)}{i}"}] for i in range(count)]
        rows = {
            "prompt": prompts,
            "question": [[{"role": "user", "content": f"say {i}"}] for i in range(count)],
            "data_source": ["arithmetic"] * count,
            "source": ["openai/gsm8k"] * count,
            "reward_model": [{"style": "rule", "ground_truth": str(i)} for i in range(count)],
        }
        pq.write_table(pa.table(rows), folder / f"{name}.parquet")
    pairs = pq.read_table(folder / "pairs.parquet")
    pairs = pairs.append_column("answer", pa.array(["no"] * len(pairs)))
    pairs = pairs.append_column("question", pa.array(["what"] * len(pairs)))
    pq.write_table(pairs, folder / "pairs.parquet")
    pq.write_table(pairs.slice(0, 20), folder / "pairs2.parquet")
    (folder / "reward.py").write_text("def f(*a, **k):\n    return 0\n\ndef g(*a, **k):\n    return 0\n")


def nested(flat: dict) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        into = tree
        *groups, last = name.split(".")
        for part in groups:
            into = into.setdefault(part, {})
        into[last] = value
    return tree


class Pool:
    """Stands for a WorkerGroup: two data-parallel ranks that return made-up numbers of the right sizes."""

    dp = 2

    def __init__(self, name: str, log: list):
        self.name, self.log, self.held = name, log, {}

    def note(self, *what) -> None:
        self.log.append((self.name, *what))

    def load_share(self, name, payload):
        self.held[name] = [table for _, table in payload]
        self.note("share", name, [(share.rows, share.epochs) for share, _ in payload])

    def compute(self, name, role, columns):
        self.note("compute", name, role, columns)
        ends = {"old_logprobs": (-1.0, 0.0), "ref_logprobs": (-0.9, -0.9), "values": (0.3, 0.3)}
        sizes = [int(t.lengths("response_ids").sum()) for t in self.held[name]]
        return [{c: np.linspace(*ends[c], size, dtype=np.float32) for c in columns} for size in sizes]

    def attach(self, name, columns):
        self.note("attach", name, [{k: v[0].tolist() for k, v in rank.items()} for rank in columns])

    def update(self, name, role, loss, denominators):
        self.note("update", name, role, repr(loss), repr(denominators))
        sizes = [int(t.lengths("response_ids").sum()) for t in self.held[name]]
        metrics = {"grad_norm": [1.0], "lr": [1.0], "skipped_steps": [0.0], f"{role}/loss": [1.0]}
        return [{"metrics": metrics, "logprobs": np.full(size, -0.4, np.float32)} for size in sizes]

    def export_hf(self, role, folder, tokenizer=None):
        self.note("export", role, tokenizer)
        return [{"seconds": 0.1, "bytes": 1.0}]

    def save(self, folder):
        self.note("save")

    def load(self, folder):
        self.note("load", folder)

    def offload(self, to_host):
        self.note("offload", to_host)

    def memory(self):
        return [{"perf/memory": 1.0}]

    def drop_shares(self):
        self.held.clear()


class Fleet:
    """Stands for the RolloutFleet."""

    restarts = 0

    def __init__(self, log: list):
        self.log = log

    def generate(self, requests, sampling, step):
        self.log.append(
            ("generate", requests["prompt_ids"].to_pylist(), requests["uid"].to_pylist(), repr(sampling), step)
        )
        ids = [[40 + i % 7, 41, 2][: 1 + i % 3] for i in range(len(requests))]
        return pa.table({
            "uid": requests["uid"],
            "sample": requests["sample"],
            "response_ids": pa.array(ids, pa.list_(pa.int32())),
            "rollout_logprobs": pa.array([[-0.6] * len(r) for r in ids], pa.list_(pa.float32())),
            "finish_reason": ["stop"] * len(ids),
            "weight_version": pa.array([step] * len(ids), pa.int32()),
        })  # fmt: skip

    def update_weights(self, folder, version):
        self.log.append(("fleet", "update", version))
        return {"seconds": 0.1}

    def __getattr__(self, name):
        return lambda *args: self.log.append(("fleet", name))


class Rewards:
    """Stands for the RewardManager."""

    def __init__(self, log: list, **arguments):
        self.log = log
        log.append(("rewards", arguments))

    def check(self, sources):
        self.log.append(("sources", sources))

    def score(self, data_source, solution, ground_truth, extra_info):
        from hybridrl.rewards.manager import RewardResult

        count = len(solution)
        self.log.append(("score", data_source, ground_truth))
        acc = (np.arange(count) % 4 == 1).astype(np.float32)
        return RewardResult(np.arange(count, dtype=np.float32) % 3, {"acc": acc}, [], {})

    def close(self):
        pass


class Recorder:
    """Stands for Megatron's DDP and optimizer where Engine.offload moves them."""

    def __init__(self):
        self.calls = []
        self.inner = self

    def __getattr__(self, name):
        return lambda: self.calls.append(name)


def engine(settings, device: str) -> list:
    """What a rank would hand to Megatron for these EngineSettings."""
    from hybridrl.megatron import config_from_hf, specs
    from hybridrl.megatron.engine import Engine
    from hybridrl.megatron.optimizer import optimizer_config, schedule_settings

    hf = config_from_hf.read_hf_config(settings.model_path, settings.trust_remote_code)
    found = [
        repr(replace(settings, megatron=None, optim=None)),
        specs.resolve_impl(settings.megatron.transformer_impl, torch.device("cpu")),
    ]
    found.append(repr(config_from_hf.transformer_config(hf, settings.megatron, torch.device("cpu"))))
    if settings.optim:
        found.append(repr(optimizer_config(settings.optim, settings.megatron)))
        found.append(repr(schedule_settings(settings.optim, settings.total_steps)))
    if isinstance(settings.megatron, Megatron) and settings.optim:
        moved, made = Recorder(), object.__new__(Engine)
        made.settings, made.device, made.model, made.optimizer = settings, torch.device(device), [moved], moved
        made.offload(True)
        found.append(moved.calls)
    return found


def pool(settings) -> list:
    engines = {role: engine(made, settings.device) for role, made in settings.engines.items()}
    return [repr(replace(settings, engines=None)), engines]


def resolved_of(cls: type, flat: dict, machine):
    config = build(cls, nested(flat), frozenset(flat))
    check(config)
    return resolve(config, machine or detect_machine(config.trainer.device), *([2] if cls is SFTConfig else []))


def run(cls: type, flat: dict, place, machine=None) -> str:
    """Everything that a configuration makes happen, as text; the message where it is refused."""
    shutil.rmtree(place / "run", ignore_errors=True)
    log: list = []
    try:
        resolved = resolved_of(cls, flat, machine)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            (_run_ppo if cls is PPOConfig else _run_sft)(resolved, log, patch)
    except ConfigError as error:
        return f"refused: {error}"
    except (ValueError, ImportError) as error:
        return f"refused: {error}"
    rows = [row for row in plan_rows(resolved) if row[0] != "set, not used in this run"]
    said = [line for line in printed.getvalue().splitlines() if "validation, step" in line or "resuming" in line]
    return "\n".join(map(repr, [*rows, *log, said, *_written(place / "run")]))


def _written(folder) -> list:
    """Files of the run and what is in those that do not merely repeat the configuration."""
    found = []
    for path in sorted(folder.rglob("*") if folder.exists() else []):
        name = str(path.relative_to(folder)).split(".tfevents")[0]
        text = ""
        if path.name == "run.json":
            text = path.read_text()
        elif path.name == "metrics.jsonl":
            text = [(line["step"], sorted(line["metrics"])) for line in map(json.loads, path.read_text().splitlines())]
        elif path.parent.name == "rollouts":
            text = repr(Trajectories.read(path).table.to_pydict())
        found.append((name.split("/events")[0], text))
    return found


def _run_ppo(resolved, log: list, patch) -> None:
    import ray

    from hybridrl.cluster import ray as cluster_ray
    from hybridrl.rewards import manager
    from hybridrl.telemetry import report
    from hybridrl.trainer import cluster_setup, main_ppo, settings

    @contextlib.contextmanager
    def running(resolved, total_steps):
        pools = settings.pools(resolved, total_steps)
        log.append({name: pool(made) for name, made in pools.items()})
        log.append(settings.server(resolved))
        with cluster_setup._ray(resolved):
            yield cluster_setup.Parts({name: Pool(name, log) for name in pools}, Fleet(log), str(place_of(resolved)))

    def place_of(resolved):
        from pathlib import Path

        folder = Path(resolved.config.data.train_files[0]).parent / "publish"
        folder.mkdir(exist_ok=True)
        return folder

    patch.setattr(cluster_setup, "running", running)
    patch.setattr(cluster_ray, "_connect", lambda *arguments: log.append(("connect", arguments)))
    patch.setattr(ray, "shutdown", lambda: None)
    patch.setattr(manager, "RewardManager", lambda **arguments: Rewards(log, **arguments))
    patch.setattr(report, "build", lambda folder: log.append("report"))
    main_ppo.train(resolved, {})


class Rank:
    """Stands for a TrainWorker of a supervised run."""

    def __init__(self, log: list, rank: int, settings):
        self.log = log
        log.append(pool(settings))

    def setup(self, init_method):
        from hybridrl.megatron.parallel import Coordinates

        return Coordinates(rank=0, world=1, tp_rank=0, tp=1, pp_rank=0, pp=1, dp_rank=0, dp=1)

    def load_share(self, name, payload):
        share, table = payload
        self.log.append(("share", share.epochs, table.table.to_pydict()))

    def update(self, *arguments):
        self.log.append(("update", repr(arguments)))
        return {"metrics": {"loss": [1.0], "entropy": [1.0], "grad_norm": [1.0], "lr": [1.0]}}

    def evaluate_loss(self, *arguments):
        self.log.append(("evaluate", repr(arguments)))
        return {"loss": 1.0}

    def __getattr__(self, name):
        return lambda *args: None


def _run_sft(resolved, log: list, patch) -> None:
    from transformers import AutoTokenizer

    from hybridrl.trainer import sft

    patch.setattr(sft, "TrainWorker", lambda rank, settings: Rank(log, rank, settings))
    patch.setattr(sft, "_sum_over_ranks", lambda parts, coords: parts)
    patch.setattr(
        sft, "_export", lambda worker, rank, folder, step, tokenizer: log.append(("export", folder, step, tokenizer))
    )
    data, model = resolved.config.data, resolved.config.model
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
    train = sft.read_pairs(data.train_files, tokenizer, data, "data.train_files")
    val = sft.read_pairs(data.val_files, tokenizer, data, "data.val_files") if data.val_files else None
    sft.fit(resolved, tokenizer, train, val, {})
