"""The rollout engine's replicas behind one face: a batch goes out in one call a replica and comes back in order."""

import asyncio
import logging
import os
import threading
from collections import deque
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hybridrl.data.balance import karmarkar_karp
from hybridrl.data.trajectories import Trajectories
from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.rollout.server import ServerSettings, VllmServer, base_environment

logger = logging.getLogger(__name__)

_LOG_LINES = 20


class RolloutFleet:
    """`num_replicas` engines of the same `settings`, as Ray actors or (executor "local", one replica) in this process.

    scheduling: a Ray scheduling strategy a replica (NodeAffinity... or PlacementGroupSchedulingStrategy);
        None leaves the node to Ray. num_cpus: what each actor takes from Ray's account, 0 to share the trainer's.
    env: environment variables a replica; on GPUs CUDA_VISIBLE_DEVICES names its devices, Ray hands out none.

    A replica that dies ends the call in progress with a RuntimeError that names it and quotes its log. Nothing is
    restarted: the fleet must be shut down and made anew.
    """

    def __init__(self, settings: ServerSettings, num_replicas: int = 1, *, executor: Literal["ray", "local"] = "ray",
                 scheduling: list[Any] | None = None, env: list[dict[str, str]] | None = None, num_cpus: float = 0):
        if executor == "local" and num_replicas != 1:
            raise ValueError(f"the local executor runs one rollout replica, not {num_replicas}: set "
                             "actor_rollout_ref.rollout.num_replicas=1 or use the ray executor")
        env, scheduling = env or [{}] * num_replicas, scheduling or [None] * num_replicas
        assert len(env) == len(scheduling) == num_replicas >= 1
        self.settings = settings
        if executor == "local":
            self._replicas = [_LocalReplica(VllmServer(settings, env[0]))]
        else:
            self._replicas = [_RayReplica(i, settings, env[i], scheduling[i], num_cpus) for i in range(num_replicas)]
        self._mean_response: float | None = None  # tokens, of the last batch

    def start(self) -> list[dict[str, Any]]:
        """Bring all engines up, at once. Returns each replica's facts (VllmServer.start). On an error all are ended."""
        try:
            facts = self._everywhere("start")
        except BaseException:
            self.shutdown()
            raise
        for replica, fact in zip(self._replicas, facts):
            replica.log_file = fact["log"]
        return facts

    def generate(self, prompts: pa.Table, sampling: SamplingSettings, step: int) -> pa.Table:
        """One response a row of `prompts`, in its order; columns as VllmServer.generate. Blocks until all are there."""
        prompts = prompts.select(["uid", "sample", "prompt_ids"])
        if prompts.num_rows == 0:
            raise ValueError("no prompts to generate for")
        expected = self._mean_response or sampling.max_tokens
        shares = share_prompts(prompts, len(self._replicas), expected)
        table = Trajectories(prompts)
        futures = [replica.submit("generate", table.take(share).table, sampling, step)
                   for replica, share in zip(self._replicas, shares)]
        parts = _gather(self._replicas, futures)
        order = np.argsort(np.concatenate(shares), kind="stable")
        result = Trajectories(pa.concat_tables(parts)).take(order)
        self._mean_response = float(result.lengths("response_ids").mean())
        return result.table

    def update_weights(self, path: str, version: int) -> dict[str, float]:
        """Every replica loads the Hugging Face folder `path` and tags what follows with `version`.

        Returns {"seconds": the slowest replica's, "bytes": read by each}.
        """
        facts = self._everywhere("update_weights", path, version)
        return {name: max(fact[name] for fact in facts) for name in ("seconds", "bytes")}

    def sleep(self, level: int = 2) -> bool:
        """Free the device memory of all replicas. False where the platform can't: nothing was done."""
        return all(self._everywhere("sleep", level))

    def wake_weights(self) -> bool:
        """Take back memory for the weights (after sleep level 2 they hold rubbish until update_weights)."""
        return all(self._everywhere("wake", ["weights"]))

    def wake_kv(self) -> bool:
        """Take back memory for the KV cache; generation may go on."""
        return all(self._everywhere("wake", ["kv_cache"]))

    def health(self) -> list[dict[str, Any]]:
        """Each replica's VllmServer.health(); RuntimeError naming a replica that is dead."""
        return self._everywhere("health")

    def shutdown(self) -> None:
        """End every engine and actor and wait for their processes. Safe to call twice and after a replica's death."""
        for replica in self._replicas:
            try:
                replica.stop()
            except Exception:  # the others must end all the same
                logger.exception("shutting down %s", replica.name)

    def _everywhere(self, method: str, *args) -> list[Any]:
        return _gather(self._replicas, [replica.submit(method, *args) for replica in self._replicas])


def share_prompts(prompts: pa.Table, replicas: int, response_tokens: float) -> list[list[int]]:
    """Row numbers for each replica (no more lists than there is work for), ascending inside a share.

    The cost of a sample is `response_tokens` expected tokens, that of a group its prompt once besides: samples of a
    prompt stay together, where its prefix is cached. With fewer prompts than replicas single samples are shared.
    """
    if replicas == 1:
        return [list(range(prompts.num_rows))]
    lengths = pc.list_value_length(prompts["prompt_ids"]).to_pylist()
    uids = prompts["uid"].to_pylist()
    groups: dict[Any, list[int]] = {}
    for row, uid in enumerate(uids):
        groups.setdefault(uid, []).append(row)
    if len(groups) < replicas:
        groups = {row: [row] for row in range(len(uids))}
    units = list(groups.values())
    bins = karmarkar_karp([lengths[rows[0]] + response_tokens * len(rows) for rows in units], min(replicas, len(units)))
    return [sorted(row for unit in bin_ for row in units[unit]) for bin_ in bins if bin_]


def _gather(replicas: list, futures: list) -> list[Any]:
    """Results of all futures. Waits for all of them even after an error, so that none still runs; raises the first."""
    results, errors = [], []
    for replica, future in zip(replicas, futures):
        try:
            results.append(replica.result(future))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results


class _LocalReplica:
    """A server in this process, on an event loop in a thread of its own."""

    def __init__(self, server: VllmServer):
        self.name, self.log_file, self._server = "rollout replica (local)", "", server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-server", daemon=True)
        self._thread.start()

    def submit(self, method: str, *args):
        if not self._thread.is_alive():
            raise RuntimeError(f"{self.name} was shut down")
        return asyncio.run_coroutine_threadsafe(getattr(self._server, method)(*args), self._loop)

    def result(self, future) -> Any:
        try:
            return future.result()
        except Exception as error:
            raise _explain(self.name, error, self.log_file) from error

    def stop(self) -> None:
        if self._thread.is_alive():
            try:
                self.submit("shutdown").result(timeout=60)
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(timeout=10)


class _RayReplica:
    """A server in a Ray actor."""

    def __init__(self, index: int, settings: ServerSettings, env: dict[str, str], scheduling: Any, num_cpus: float):
        import ray

        if not ray.is_initialized():
            raise RuntimeError("Ray is not up: join or start a cluster before the rollout fleet is made")
        self.name, self.log_file = f"rollout replica {index}", ""
        env = base_environment(settings) | env
        if "CUDA_VISIBLE_DEVICES" in env:
            env["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"  # Ray hides all GPUs from an actor without any
        self._actor = ray.remote(VllmServer).options(
            num_cpus=num_cpus, num_gpus=0, max_restarts=0, max_concurrency=16,
            scheduling_strategy=scheduling, runtime_env={"env_vars": env}).remote(settings, env)

    def submit(self, method: str, *args):
        if self._actor is None:
            raise RuntimeError(f"{self.name} was shut down")
        return getattr(self._actor, method).remote(*args)

    def result(self, future) -> Any:
        import ray

        try:
            return ray.get(future)
        except ray.exceptions.RayTaskError as error:
            raise _explain(self.name, error.cause, self.log_file) from error
        except ray.exceptions.RayError as error:
            raise _explain(self.name, error, self.log_file) from error

    def stop(self) -> None:
        import ray

        if self._actor is None:
            return
        actor, self._actor = self._actor, None
        try:
            ray.get(actor.shutdown.remote(), timeout=60)
        except ray.exceptions.RayActorError:
            pass  # dead already; its reaper clears up
        finally:
            ray.kill(actor)


def _explain(name: str, error: Exception, log_file: str) -> Exception:
    """A ValueError stays one (the user's settings); anything else becomes a RuntimeError with the replica's log."""
    if type(error) is ValueError:
        return ValueError(f"{name}: {error}")
    tail = ""
    if log_file and os.path.isfile(log_file):  # the replica may be on another node
        with open(log_file, errors="replace") as file:
            tail = f"\nlast lines of {log_file}:\n" + "".join(deque(file, maxlen=_LOG_LINES))
    return RuntimeError(f"{name} failed: {type(error).__name__}: {error}\n"
                        f"Replicas are not restarted: end this run and start it again from its last checkpoint.{tail}")
