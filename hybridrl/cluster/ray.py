"""The executor on Ray: a placement group with one bundle a rank, one actor in each."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

# Actors must not inherit the driver's thread settings, and a dead driver must take them along.
_COMMON_ENV = {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def session(address: str | None, num_cpus: int | None, need_cpus: int, local_gpus: int) -> Iterator[None]:
    """Joins a cluster (`address` or RAY_ADDRESS) or starts a local Ray with at least `need_cpus` CPUs, and leaves or
    ends it on the way out."""
    _connect(address or os.environ.get("RAY_ADDRESS"), num_cpus or max(os.cpu_count() or 1, need_cpus), local_gpus)
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
            ray.init(num_cpus=cpus, num_gpus=gpus, dashboard_host="127.0.0.1", **quiet)
            return
        except (ConnectionError, TimeoutError):
            ray.shutdown()
            if attempt:
                raise


class RayExecutor:
    """Ranks of a pool as Ray actors. ValueError before anything starts when the cluster is too small."""

    def __init__(self, worker_class: type, settings: Any, name: str, nnodes: int = 1, timeout: float = 120.0):
        self.world, cuda = settings.world, settings.device == "cuda"
        bundle = {"CPU": 1.0, **({"GPU": 1.0} if cuda else {})}
        self._check_resources(bundle, name)
        self.group = placement_group([bundle] * self.world, strategy="PACK" if nnodes > 1 else "STRICT_PACK", name=name)
        try:
            ray.get(self.group.ready(), timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            remove_placement_group(self.group)
            raise ValueError(
                f"Ray could not place pool {name!r} ({self.world} bundles of {bundle}) within {timeout:.0f} s: "
                f"available now {_short(ray.available_resources())}. Mend: free resources, or lower "
                "trainer.n_gpus_per_node or trainer.nnodes."
            ) from None
        env = {**_COMMON_ENV, "OMP_NUM_THREADS": str(settings.threads)}
        self.actors = []
        for rank in range(self.world):
            options = dict(
                num_cpus=1,
                num_gpus=1 if cuda else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, rank),
                runtime_env={"env_vars": env},
                name=f"{name}-{rank}-{os.getpid()}",
            )
            self.actors.append(ray.remote(_Rank).options(**options).remote(worker_class, rank, settings))

    def _check_resources(self, bundle: dict[str, float], name: str) -> None:
        total = ray.cluster_resources()
        for kind, each in bundle.items():
            if total.get(kind, 0.0) < each * self.world:
                raise ValueError(
                    f"pool {name!r} needs {each * self.world:.0f} {kind}s, Ray has {total.get(kind, 0):.0f}. "
                    "Mend: lower trainer.n_gpus_per_node, trainer.nnodes or trainer.placement, or add nodes."
                )

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def run(self, rank: int, name: str, *args: Any) -> Any:
        return self.actors[rank].run.remote(name, *args)

    def wait(self, pending: list) -> list:
        """Results in order. The first failure is raised at once: the other ranks may hang in a collective with it."""
        left = list(pending)
        while left:
            done, left = ray.wait(left, num_returns=1)
            ray.get(done)
        return ray.get(pending)

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
