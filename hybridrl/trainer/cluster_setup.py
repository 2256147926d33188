"""Brings a run's processes up and takes them down: Ray, the pools of training ranks, the rollout fleet."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybridrl.cluster.dispatch import WorkerGroup
from hybridrl.resolution import Resolved
from hybridrl.rollout.fleet import RolloutFleet
from hybridrl.trainer import settings
from hybridrl.trainer.worker import TrainWorker


@dataclass
class Parts:
    """What the loop drives. `publish_dir` holds the weights on their way to the rollout engine. No groups with
    trainer.debug=rollout, no fleet with train and replay."""

    groups: dict[str, WorkerGroup]
    fleet: RolloutFleet | None
    publish_dir: str


@contextlib.contextmanager
def running(resolved: Resolved, total_steps: int) -> Iterator[Parts]:
    """Starts everything, and ends every process of it on the way out, whatever happened inside."""
    with contextlib.ExitStack() as stack:
        executor = resolved.config.trainer.executor
        if executor == "ray":
            stack.enter_context(_ray(resolved))
        publish_dir = _publish_dir(resolved)
        stack.callback(shutil.rmtree, publish_dir, ignore_errors=True)
        groups = {}
        for name, pool in settings.pools(resolved, total_steps).items():
            groups[name] = WorkerGroup(_executor(resolved, name, pool), TrainWorker)
            stack.callback(groups[name].shutdown)
        fleet = None
        if not settings.recorded(resolved):
            fleet = _fleet(resolved, groups.get("actor"))
            stack.callback(fleet.shutdown)
        _start(resolved, groups, fleet)

        def watch() -> None:
            for group in groups.values():
                group.check()

        if fleet:
            fleet.watch = watch
        yield Parts(groups, fleet, publish_dir)


def _start(resolved: Resolved, groups: dict[str, WorkerGroup], fleet: RolloutFleet | None) -> None:
    """On a GPU vLLM measures free memory when it starts, so it starts first and sleeps before the trainer allocates. On
    the CPU both start together: neither measures anything."""
    if resolved.machine.device == "cpu" and resolved.config.trainer.executor == "ray":
        waits = [(group, group.submit("setup", group.rendezvous())) for group in groups.values()]
        if fleet:
            fleet.start()
        for group, wait in waits:
            group.coords = wait()
        return
    if fleet:
        fleet.start()
    if fleet and groups and settings.sleeps(resolved):
        fleet.sleep()
    for group in groups.values():
        group.start()


def _executor(resolved: Resolved, name: str, pool):
    if resolved.config.trainer.executor == "local":
        from hybridrl.cluster.local import LocalExecutor

        return LocalExecutor(TrainWorker, pool)
    if resolved.config.trainer.executor == "torchrun":
        from hybridrl.cluster.torchrun import TorchrunExecutor

        return TorchrunExecutor(TrainWorker, pool, name)
    from hybridrl.cluster.ray import RayExecutor

    nnodes = resolved.config.trainer.nnodes
    # Pools of their own are counted in ranks, not in nodes.
    return RayExecutor(TrainWorker, pool, name, nnodes if name == "actor" or nnodes == 1 else None)


def _ray(resolved: Resolved) -> contextlib.AbstractContextManager:
    from hybridrl.cluster.ray import session

    init = resolved.config.ray_kwargs.ray_init
    ranks = sum(p.world for p in settings.pools(resolved, 1).values())
    return session(init.address, init.num_cpus, ranks + resolved.rollout.replicas, resolved.machine.gpus)


def _fleet(resolved: Resolved, actor: WorkerGroup | None) -> RolloutFleet:
    """Replicas on the GPUs of the training ranks (colocated), in a pool of their own, or anywhere on the CPU."""
    replicas, tp = resolved.rollout.replicas, resolved.rollout.tp
    env: list[dict[str, str]] = [{} for _ in range(replicas)]
    scheduling: list = [None] * replicas
    if resolved.machine.device == "cuda" and resolved.config.trainer.executor == "ray":
        if resolved.rollout.colocated and actor:
            env, scheduling = _on_ranks(actor.where(), replicas, tp)
        else:
            from hybridrl.cluster.ray import own_gpus

            env, scheduling = own_gpus(replicas, tp)
    elif resolved.config.trainer.executor == "ray" and resolved.config.trainer.nnodes > 1 and actor:
        from hybridrl.cluster.ray import on_node

        nodes = list(dict.fromkeys(rank["node"] for rank in actor.where()))
        scheduling = [on_node(nodes[i % len(nodes)]) for i in range(replicas)]
    elif resolved.config.trainer.executor == "torchrun":
        env = [{"TORCHELASTIC_USE_AGENT_STORE": ""}]  # the engine's own groups are none of torchrun's
    return RolloutFleet(
        settings.server(resolved),
        replicas,
        executor="ray" if resolved.config.trainer.executor == "ray" else "local",
        env=env,
        scheduling=scheduling,
    )


def _on_ranks(ranks: list[dict], replicas: int, tp: int) -> tuple[list[dict[str, str]], list]:
    """Replica i takes the GPUs of ranks [i * tp, (i + 1) * tp), which are on one node (resolution checks that)."""
    from hybridrl.cluster.ray import on_node

    env, scheduling = [], []
    for i in range(replicas):
        mine = ranks[i * tp : (i + 1) * tp]
        env.append({"CUDA_VISIBLE_DEVICES": ",".join(str(r["gpus"]) for r in mine)})
        scheduling.append(on_node(mine[0]["node"]))
    return env, scheduling


def _publish_dir(resolved: Resolved) -> str:
    """In memory on one node; in the run folder, which must be shared, on several."""
    if resolved.config.trainer.nnodes > 1:
        parent = Path(resolved.config.trainer.default_local_dir).absolute()
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".weights-", dir=parent)
    shm = "/dev/shm"
    return tempfile.mkdtemp(prefix="hybridrl-", dir=shm if os.access(shm, os.W_OK) else None)
