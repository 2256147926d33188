"""Brings a run's processes up and takes them down: Ray, the pools of training ranks, the rollout fleet."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
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
    """What the loop drives. `publish_dir` holds the weights on their way to the rollout engine."""

    groups: dict[str, WorkerGroup]
    fleet: RolloutFleet
    publish_dir: str

    def group_of(self, resolved: Resolved, role: str) -> WorkerGroup:
        return self.groups["actor" if role == "actor" else settings.pool_of(resolved, role)]


@contextlib.contextmanager
def running(resolved: Resolved, total_steps: int) -> Iterator[Parts]:
    """Starts everything, and ends every process of it on the way out, whatever happened inside.

    SIGTERM is answered like Ctrl-C, so that a scheduler's kill cleans up, too.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm_as_interrupt())
        executor = resolved.config.trainer.executor
        if executor == "ray":
            stack.enter_context(_ray(resolved))
        publish_dir = _publish_dir(resolved)
        stack.callback(shutil.rmtree, publish_dir, ignore_errors=True)
        groups = {}
        for name, pool in settings.pools(resolved, total_steps).items():
            groups[name] = WorkerGroup(_executor(resolved, name, pool), TrainWorker)
            stack.callback(groups[name].shutdown)
        fleet = _fleet(resolved, groups["actor"])
        stack.callback(fleet.shutdown)
        _start(resolved, groups, fleet)
        yield Parts(groups, fleet, publish_dir)


def _start(resolved: Resolved, groups: dict[str, WorkerGroup], fleet: RolloutFleet) -> None:
    """On a GPU vLLM measures free memory when it starts, so it starts first and sleeps before the trainer allocates. On
    the CPU both start together: neither measures anything."""
    if resolved.machine.device == "cpu" and resolved.config.trainer.executor == "ray":
        waits = [(group, group.submit("setup", group.rendezvous())) for group in groups.values()]
        fleet.start()
        for group, wait in waits:
            group.coords = wait()
        return
    fleet.start()
    if resolved.config.actor_rollout_ref.rollout.free_cache_engine and resolved.rollout.colocated:
        fleet.sleep()
    for group in groups.values():
        group.start()


def _executor(resolved: Resolved, name: str, pool):
    if resolved.config.trainer.executor == "local":
        from hybridrl.cluster.local import LocalExecutor

        return LocalExecutor(TrainWorker, pool)
    from hybridrl.cluster.ray import RayExecutor

    return RayExecutor(TrainWorker, pool, name, resolved.config.trainer.nnodes)


def _ray(resolved: Resolved) -> contextlib.AbstractContextManager:
    from hybridrl.cluster.ray import session

    init = resolved.config.ray_kwargs.ray_init
    ranks = sum(p.world for p in settings.pools(resolved, 1).values())
    return session(init.address, init.num_cpus, ranks + resolved.rollout.replicas, resolved.machine.gpus)


def _fleet(resolved: Resolved, actor: WorkerGroup) -> RolloutFleet:
    """Replicas on the GPUs of the training ranks (colocated), in a pool of their own, or anywhere on the CPU."""
    replicas, tp = resolved.rollout.replicas, resolved.rollout.tp
    env: list[dict[str, str]] = [{} for _ in range(replicas)]
    scheduling: list = [None] * replicas
    if resolved.machine.device == "cuda" and resolved.config.trainer.executor == "ray":
        if resolved.rollout.colocated:
            env, scheduling = _on_ranks(actor.where(), replicas, tp)
        else:
            from hybridrl.cluster.ray import own_gpus

            env, scheduling = own_gpus(replicas, tp)
    return RolloutFleet(
        settings.server(resolved),
        replicas,
        executor=resolved.config.trainer.executor,
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


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
