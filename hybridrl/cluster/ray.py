"""The executor on Ray: a placement group with one bundle a rank, one actor in each."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from hybridrl.errors import ProcessDied

# A rank whose peer died fails in its collective, often before Ray knows of the death itself.
_CAUSE_S = 3.0

# Actors must not inherit the driver's thread settings, and a dead driver must take them along.
_COMMON_ENV = {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def session(address: str | None, num_cpus: int | None, need_cpus: int, local_gpus: int) -> Iterator[None]:
    """Joins a cluster (`address` or RAY_ADDRESS) or starts a local Ray with at least `need_cpus` CPUs, and leaves or
    ends it on the way out."""
    at_sigterm = signal.getsignal(signal.SIGTERM)
    _connect(address or os.environ.get("RAY_ADDRESS"), num_cpus or max(os.cpu_count() or 1, need_cpus), local_gpus)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray has put its own in place
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None, cpus: int, gpus: int) -> None:
    """The dashboard listens on loopback only; usage statistics are off. The first start on a fresh machine sometimes
    times out: it is tried twice."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = dict(log_to_driver=False, logging_level="ERROR")
    if address:
        ray.init(address=address, **quiet)
        return
    for attempt in range(2):
        try:
            ray.init(address="local", num_cpus=cpus, num_gpus=gpus, dashboard_host="127.0.0.1", **quiet)
            return
        except (ConnectionError, TimeoutError):
            ray.shutdown()
            if attempt:
                raise


class RayExecutor:
    """Ranks of a pool as Ray actors. ValueError before anything starts when the cluster is too small.

    nnodes: so many nodes have the same number of ranks each, neighbours together; None: on few nodes, any of them.
    """

    def __init__(self, worker_class: type, settings: Any, name: str, nnodes: int | None = 1, timeout: float = 120.0):
        self.name, self.world, cuda = name, settings.world, settings.device == "cuda"
        together = self.world // nnodes if nnodes and nnodes > 1 else 1  # ranks a bundle
        bundle = {"CPU": float(together), **({"GPU": float(together)} if cuda else {})}
        bundles = [bundle] * (self.world // together)
        self._check_resources(bundle, len(bundles), name)
        strategy = "PACK" if nnodes is None else "STRICT_SPREAD" if nnodes > 1 else "STRICT_PACK"
        self.group = placement_group(bundles, strategy=strategy, name=name)
        try:
            ray.get(self.group.ready(), timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            remove_placement_group(self.group)
            raise ValueError(
                f"Ray could not place pool {name!r} ({len(bundles)} bundles of {bundle}, {strategy}) within"
                f" {timeout:.0f} s: available now {_short(ray.available_resources())}. Mend: free resources, or lower "
                "trainer.n_gpus_per_node or trainer.nnodes."
            ) from None
        env = {**_COMMON_ENV, "OMP_NUM_THREADS": str(settings.threads)}
        self.actors = []
        for rank in range(self.world):
            options = dict(
                num_cpus=1,
                num_gpus=1 if cuda else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, rank // together),
                runtime_env={"env_vars": env},
                name=f"{name}-{rank}-{os.getpid()}",
            )
            self.actors.append(ray.remote(_Rank).options(**options).remote(worker_class, rank, settings))

    def _check_resources(self, bundle: dict[str, float], count: int, name: str) -> None:
        total = ray.cluster_resources()
        for kind, each in bundle.items():
            if total.get(kind, 0.0) < each * count:
                raise ValueError(
                    f"pool {name!r} needs {each * count:.0f} {kind}s, Ray has {total.get(kind, 0):.0f}. "
                    "Mend: lower trainer.n_gpus_per_node, trainer.nnodes or trainer.placement, or add nodes."
                )

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def run(self, rank: int, name: str, *args: Any) -> Any:
        return self.actors[rank].run.remote(name, *args)

    def wait(self, pending: list) -> list:
        """Results, in the order of ranks. The first failure is raised at once: the other ranks may hang in a collective
        with it. ProcessDied names the ranks whose processes are gone."""
        left = list(pending)
        while left:
            done, left = ray.wait(left, num_returns=1)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                self._raise_dead(pending, error)
                raise
        return ray.get(pending)

    def check(self) -> None:
        """ProcessDied if a rank's process is gone. Does not wait for ranks that are at work."""
        pings = [actor.__ray_ready__.remote() for actor in self.actors]
        ray.wait(pings, num_returns=len(pings), timeout=0.5)
        self._raise_dead(pings, None, wait=0)

    def _raise_dead(self, pending: list, error: Exception | None, wait: float = _CAUSE_S) -> None:
        done, _ = ray.wait(pending, num_returns=len(pending), timeout=wait)
        dead = {}
        for rank, ref in enumerate(pending):
            if ref in done:
                try:
                    ray.get(ref)
                except ray.exceptions.RayActorError as death:
                    dead[rank] = str(death).strip().splitlines()
                except ray.exceptions.RayError:
                    pass
        if dead:
            ranks = ", ".join(map(str, dead))
            why = next(iter(dead.values()))
            raise ProcessDied(
                f"rank {ranks} of pool {self.name!r} died (killed, out of memory, or a crash). Ray: {' '.join(why[:4])}"
            ) from error

    def shutdown(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)


class _Rank:
    """The actor around a worker."""

    def __init__(self, worker_class: type, rank: int, settings: Any):
        os.environ["HYBRIDRL_NODE_IP"] = ray.util.get_node_ip_address()
        os.environ["HYBRIDRL_NODE_ID"] = ray.get_runtime_context().get_node_id()
        self.worker = worker_class(rank, settings)

    def run(self, name: str, *args: Any) -> Any:
        return getattr(self.worker, name)(*args)


def _short(resources: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in resources.items() if k in ("CPU", "GPU")}


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Pins an actor to a node."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def own_gpus(replicas: int, tp: int) -> tuple[list[dict[str, str]], list]:
    """Reserves `tp` GPUs of one node a replica in a placement group; (environment, scheduling) of each replica.

    The group lives until Ray shuts down. ValueError when the cluster does not have them.
    """
    bundle = {"CPU": 1.0, "GPU": float(tp)}
    group = placement_group([bundle] * replicas, strategy="PACK", name="rollout")
    try:
        ray.get(group.ready(), timeout=120)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        raise ValueError(
            f"Ray could not place {replicas} rollout replicas of {tp} GPUs: available now "
            f"{_short(ray.available_resources())}. Mend: lower trainer.placement.rollout."
        ) from None
    env, scheduling = [], []
    for i in range(replicas):
        options = dict(num_cpus=0.5, num_gpus=tp, scheduling_strategy=PlacementGroupSchedulingStrategy(group, i))
        probe = ray.remote(_visible_gpus).options(**options).remote()
        env.append({"CUDA_VISIBLE_DEVICES": ray.get(probe)})
        scheduling.append(PlacementGroupSchedulingStrategy(group, i))
    return env, scheduling


def _visible_gpus() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]
