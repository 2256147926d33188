"""What one training rank does for the roles that live in it: actor, reference, critic.

The executors in hybridrl.cluster run these methods on all ranks of a pool; `dispatch` says who gets what. State between
calls is the step's share: each phase adds its columns to it, and the next phase finds them there.
"""

import os
import socket
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from hybridrl.algorithms.aggregation import Denominators
from hybridrl.cluster.dispatch import dispatch
from hybridrl.data.batching import Share
from hybridrl.data.packed import PackedBatch, pack
from hybridrl.data.trajectories import Trajectories
from hybridrl.megatron import checkpoint, losses, parallel, platform
from hybridrl.megatron.engine import Engine, EngineSettings, sum_metrics
from hybridrl.telemetry.phases import memory_metrics


@dataclass(frozen=True)
class PoolSettings:
    """A pool of ranks with one parallel layout, and the engines of the roles that share its processes."""

    device: str
    world: int
    tp: int
    pp: int
    seed: int
    engines: dict[str, EngineSettings]
    threads: int = 1


@dataclass
class _Step:
    """The share of one step on this rank, packed once."""

    share: Share
    table: Trajectories
    packs: list[list[list[PackedBatch]]] = field(default_factory=list)  # [epoch][mini][micro]

    def attach(self, name: str, values: np.ndarray, offsets: np.ndarray) -> None:
        """Adds a per-token column (jagged over the share's rows) to every pack; response_mask replaces the mask."""
        for minis, packs in zip(self.share.epochs, self.packs, strict=True):
            for micros, mini_packs in zip(minis, packs, strict=True):
                for rows, batch in zip(micros, mini_packs, strict=True):
                    flat = np.concatenate([values[offsets[r] : offsets[r + 1]] for r in rows])
                    column = torch.from_numpy(flat.astype(np.float32)).to(batch.targets.device)
                    if name == "response_mask":
                        batch.response_mask = column
                    else:
                        batch.columns[name] = column


class TrainWorker:
    """One rank. Built by an executor; `setup` joins the groups and builds the models."""

    def __init__(self, rank: int, settings: PoolSettings):
        self.rank, self.settings = rank, settings
        self.engines: dict[str, Engine] = {}
        self.steps: dict[str, _Step] = {}

    @dispatch("first")
    def rendezvous(self) -> str:
        """An init_method that the other ranks can reach this one under."""
        if torch.distributed.is_torchelastic_launched():
            return "env://"  # torch would look for torchrun's store at any other address
        host = os.environ.get("HYBRIDRL_NODE_IP", "127.0.0.1")
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    @dispatch("all")
    def setup(self, init_method: str) -> parallel.Coordinates:
        """Joins the process group and builds each role's engine. Collective."""
        torch.set_num_threads(self.settings.threads)
        self.device = platform.activate("cpu" if self.settings.device == "cpu" else f"cuda:{self._local_gpu()}")
        self.coords = parallel.initialize(
            self.rank,
            self.settings.world,
            self.device,
            self.settings.tp,
            self.settings.pp,
            self.settings.seed,
            init_method,
        )
        for role, engine in self.settings.engines.items():
            self.engines[role] = Engine(engine, self.coords, self.device)
        return self.coords

    def _local_gpu(self) -> int:
        """Ray shows each rank its own GPU only; under torchrun all of a node's ranks see all of its GPUs."""
        return 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", self.rank))

    # -- data ------------------------------------------------------------------------------------------------------

    @dispatch("dp")
    def load_share(self, name: str, payload: tuple[Share, Trajectories]) -> None:
        """Takes this data-parallel rank's samples of the step and packs them, once for all passes that name it."""
        share, table = payload
        step = self.steps[name] = _Step(share, table)
        multiple = self.coords.tp  # sequence parallelism cuts T over the tensor-parallel ranks

        def packed(rows: list[int]) -> PackedBatch:
            return pack(table.take(rows), pad_multiple=multiple).to(self.device)

        step.packs = [[[packed(rows) for rows in micros] for micros in minis] for minis in share.epochs]

    @dispatch("dp")
    def attach(self, name: str, columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds per-token columns to a share, each (values, offsets) over its rows."""
        for column, (values, offsets) in columns.items():
            self.steps[name].attach(column, values, offsets)

    # -- phases ----------------------------------------------------------------------------------------------------

    @dispatch("dp")
    def compute(self, name: str, role: str, columns: dict[str, str]) -> dict[str, np.ndarray]:
        """Forward only: the head's outputs (logprobs, sum_pi_squared or values) of every response token of the share
        `name`, flat in the order of its rows; kept with the packs. `columns`: the column's name -> the output."""
        step = self.steps[name]
        packs = [batch for mini in step.packs[0] for batch in mini]
        squares = "sum_pi_squared" in columns.values()
        parts = self.engines[role].run(packs, losses.collect, train=False, squares=squares)
        rows = [row for mini in step.share.epochs[0] for micro in mini for row in micro]
        offsets = np.concatenate([[0], np.cumsum(step.table.lengths("response_ids"))])
        found = {column: np.zeros(offsets[-1], np.float32) for column in columns}
        if parts:  # the last pipeline stage
            place = np.concatenate([np.arange(offsets[r], offsets[r + 1]) for r in rows])
            for column, output in columns.items():
                found[column][place] = torch.cat([part[output] for part in parts]).float().cpu().numpy()
                step.attach(column, found[column], offsets)
        return found

    @dispatch("dp")
    def update(
        self,
        name: str,
        role: str,
        loss: losses.ActorLoss | losses.CriticLoss | losses.SupervisedLoss,
        denoms: list[list[Denominators]],
    ) -> dict:
        """Optimizer steps over all epochs and mini-batches of a share. denoms[epoch][mini] are global.

        Returns {"metrics": lists over optimizer steps of this rank's part of the sums, "logprobs": what the first
        epoch's own forward gave, flat in the order of the share's rows (zeros where the loss has none)}.
        """
        engine, step, found = self.engines[role], self.steps[name], defaultdict(list)
        offsets = np.concatenate([[0], np.cumsum(step.table.lengths("response_ids"))])
        own = np.zeros(offsets[-1], np.float32)
        for epoch, minis in enumerate(step.packs):
            for mini, packs in enumerate(minis):
                parts, stats = self._one_step(engine, packs, loss, denoms[epoch][mini])
                for rows, part in zip(step.share.epochs[epoch][mini], parts, strict=False):
                    logprobs = part.pop("_logprobs", None)
                    if epoch == 0 and logprobs is not None:
                        place = np.concatenate([np.arange(offsets[r], offsets[r + 1]) for r in rows])
                        own[place] = logprobs.float().cpu().numpy()
                for metric, value in {**losses.to_floats(sum_metrics(parts)), **stats}.items():
                    found[metric].append(value)
        return {"metrics": dict(found), "logprobs": own}

    @staticmethod
    def _one_step(engine: Engine, packs: list[PackedBatch], loss, denom: Denominators):
        def loss_fn(out, batch):
            value, metrics = loss(out, batch, denom)
            if "logprobs" in out:
                metrics["_logprobs"] = out["logprobs"].detach()
            return value, metrics

        parts = engine.run(packs, loss_fn, train=True)
        return parts, engine.step()

    @dispatch("dp")
    def evaluate_loss(self, name: str, role: str, loss: losses.SupervisedLoss, denom: Denominators) -> dict[str, float]:
        """This rank's part of the loss over a share, forward only."""
        packs = [batch for mini in self.steps[name].packs[0] for batch in mini]
        parts = self.engines[role].run(packs, lambda out, batch: loss(out, batch, denom), train=False)
        return losses.to_floats(sum_metrics(parts))

    @dispatch("all")
    def drop_shares(self) -> None:
        """Frees the step's samples and packs."""
        self.steps.clear()

    # -- weights, checkpoints, memory ------------------------------------------------------------------------------

    @dispatch("all")
    def export_hf(self, role: str, folder: str, tokenizer: str | None = None) -> dict[str, float]:
        """Writes a role's weights as a Hugging Face folder (which exists). Returns seconds and bytes of this rank."""
        start = time.perf_counter()
        written = self.engines[role].export_hf(folder, tokenizer)
        return {"seconds": time.perf_counter() - start, "bytes": float(written)}

    @dispatch("all")
    def save(self, folder: str) -> None:
        """Writes this rank's part of every trained role below `folder`."""
        for role, engine in self.engines.items():
            if engine.optimizer is not None:
                checkpoint.save_rank(engine, os.path.join(folder, role))

    @dispatch("all")
    def load(self, folder: str) -> None:
        """Restores what `save` wrote, on the same split."""
        for role, engine in self.engines.items():
            if engine.optimizer is not None:
                checkpoint.load_rank(engine, os.path.join(folder, role))

    @dispatch("all")
    def memory(self) -> dict[str, float]:
        """Memory of this rank, GiB, as telemetry.phases.memory_metrics names it."""
        return memory_metrics()

    @dispatch("all")
    def offload(self, to_host: bool) -> None:
        """Moves to host memory (and back) what the config lets go while the rollout engine has the GPU."""
        for engine in self.engines.values():
            engine.offload(to_host)

    @dispatch("all")
    def where(self) -> dict[str, object]:
        """Process id, and the GPUs that this rank may see."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return {"pid": os.getpid(), "gpus": gpus, "node": os.environ.get("HYBRIDRL_NODE_ID", "")}

    @dispatch("all")
    def close(self) -> None:
        """Leaves the process groups."""
        parallel.shutdown()
