"""The rollout engine's replicas behind one face: a batch goes out in one call a replica and comes back in order."""

import asyncio
import concurrent.futures
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
from hybridrl.errors import ProcessDied
from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.rollout.server import ServerSettings, VllmServer, base_environment

logger = logging.getLogger(__name__)

_LOG_LINES = 20
_POLL_S = 2.0  # how often a wait for replicas looks after everything else
_NEED_WEIGHTS = ("generate", "health")  # what a new replica cannot do before it has the published weights


class RolloutFleet:
    """`num_replicas` engines of the same `settings`, as Ray actors or (executor "local", one replica) in this process.

    scheduling: a Ray scheduling strategy a replica (NodeAffinity... or PlacementGroupSchedulingStrategy);
        None leaves the node to Ray. num_cpus: what each actor takes from Ray's account, 0 to share the trainer's.
    env: environment variables a replica; on GPUs CUDA_VISIBLE_DEVICES names its devices, Ray hands out none.

    A replica that dies (its actor or its engine) is replaced by a new one with the same settings, which loads the
    weights published last and is asked the same again: requests draw from seeds of their own, so the answer is the
    same. The folder given to `update_weights` must therefore stay until the next call of it. More than
    `restarts_a_step` deaths between two weight updates end the call with a ProcessDied that names the replica and
    quotes its log. `restarts` counts all of them. `watch` is called every few seconds while replicas are waited for;
    what it raises ends the wait.
    """

    def __init__(self, settings: ServerSettings, num_replicas: int = 1, *, executor: Literal["ray", "local"] = "ray",
                 scheduling: list[Any] | None = None, env: list[dict[str, str]] | None = None, num_cpus: float = 0,
                 restarts_a_step: int = 3):
        if executor == "local" and num_replicas != 1:
            raise ValueError(f"the local executor runs one rollout replica, not {num_replicas}: set "
                             "actor_rollout_ref.rollout.num_replicas=1 or use the ray executor")
        env, scheduling = env or [{}] * num_replicas, scheduling or [None] * num_replicas
        assert len(env) == len(scheduling) == num_replicas >= 1
        self.settings, self.restarts_a_step = settings, restarts_a_step
        self.restarts, self.watch = 0, lambda: None
        self._restarts_now = 0  # since the last weight update
        self._published: tuple[str, int] | None = None
        if executor == "local":
            self._replicas = [_LocalReplica(settings, env[0])]
        else:
            self._replicas = [_RayReplica(i, settings, env[i], scheduling[i], num_cpus) for i in range(num_replicas)]
        self._mean_response: float | None = None  # tokens, of the last batch

    def start(self) -> list[dict[str, Any]]:
        """Bring all engines up, at once. Returns each replica's facts (VllmServer.start). On an error all are ended."""
        try:
            return self._run(dict.fromkeys(range(len(self._replicas)), ("start",)), replace=False)
        except BaseException:
            self.shutdown()
            raise

    def generate(self, prompts: pa.Table, sampling: SamplingSettings, step: int) -> pa.Table:
        """One response a row of `prompts`, in its order; columns as VllmServer.generate. Blocks until all are there."""
        prompts = prompts.select(["uid", "sample", "prompt_ids"])
        if prompts.num_rows == 0:
            raise ValueError("no prompts to generate for")
        expected = self._mean_response or sampling.max_tokens
        shares = share_prompts(prompts, len(self._replicas), expected)
        table = Trajectories(prompts)
        parts = self._run({i: ("generate", table.take(share).table, sampling, step) for i, share in enumerate(shares)})
        order = np.argsort(np.concatenate(shares), kind="stable")
        result = Trajectories(pa.concat_tables(parts)).take(order)
        self._mean_response = float(result.lengths("response_ids").mean())
        return result.table

    def update_weights(self, path: str, version: int) -> dict[str, float]:
        """Every replica loads the Hugging Face folder `path` and tags what follows with `version`.

        `path` must stay until the next call: a replica that is replaced loads it. Returns {"seconds": the slowest
        replica's, "bytes": read by each}.
        """
        facts = self._everywhere("update_weights", path, version)
        self._published, self._restarts_now = (path, version), 0
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
        return self._run(dict.fromkeys(range(len(self._replicas)), (method, *args)))

    def _run(self, calls: dict[int, tuple], replace: bool = True) -> list[Any]:
        """Results of calls (replica -> method and arguments), in the order of replicas.

        Waits for all of them even after an error, so that none still runs; raises the first.
        """
        pending = {i: self._replicas[i].submit(*call) for i, call in calls.items()}
        results, errors = {}, []
        while pending:
            i = self._first_done(pending)
            replica, future = self._replicas[i], pending.pop(i)
            try:
                results[i] = replica.result(future)
            except ReplicaDied as error:
                try:
                    if not replace:
                        raise
                    again = self._replace(i, calls[i][0], error)
                    pending[i] = again.submit(*calls[i])
                except Exception as failed:
                    errors.append(failed)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return [results[i] for i in sorted(results)]

    def _first_done(self, pending: dict[int, Any]) -> int:
        """A replica whose future is done. What `watch` raises passes through."""
        while (done := self._replicas[0].first_done(list(pending.values()), _POLL_S)) is None:
            self.watch()
        return list(pending)[done]

    def _replace(self, i: int, method: str, error: "ReplicaDied"):
        """Ends what is left of replica i and starts it anew, with the published weights if `method` needs them."""
        if self._restarts_now >= self.restarts_a_step:
            raise ProcessDied(f"{error}\nReplicas are replaced {self.restarts_a_step} times between two weight "
                              "updates, and these were more") from error
        self._restarts_now += 1
        self.restarts += 1
        logger.warning("%s died and is replaced: %s", self._replicas[i].name, str(error).splitlines()[0])
        replica = self._replicas[i] = self._replicas[i].anew()
        replica.result(replica.submit("start"))
        if self._published and method in _NEED_WEIGHTS:
            replica.result(replica.submit("update_weights", *self._published))
        return replica


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


class ReplicaDied(ProcessDied):
    """A replica's actor or engine is gone."""


class _LocalReplica:
    """A server in this process, on an event loop in a thread of its own."""

    def __init__(self, settings: ServerSettings, env: dict[str, str]):
        self.name, self.log_file, self._made_of = "rollout replica (local)", "", (settings, env)
        self._server = VllmServer(settings, env)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-server", daemon=True)
        self._thread.start()

    def submit(self, method: str, *args):
        if not self._thread.is_alive():
            raise RuntimeError(f"{self.name} was shut down")
        return asyncio.run_coroutine_threadsafe(getattr(self._server, method)(*args), self._loop)

    @staticmethod
    def first_done(futures: list, timeout: float) -> int | None:
        """Index of a future that is done, None when none is within `timeout` seconds."""
        done, _ = concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_COMPLETED)
        return futures.index(done.pop()) if done else None

    def result(self, future) -> Any:
        try:
            return _with_log(self, future.result())
        except Exception as error:
            raise _explain(self.name, error, self.log_file) from error

    def anew(self) -> "_LocalReplica":
        """Ends this one; a new one of the same settings."""
        self.stop()
        return _LocalReplica(*self._made_of)

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
        self._made_of = (index, settings, env, scheduling, num_cpus)
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

    @staticmethod
    def first_done(futures: list, timeout: float) -> int | None:
        """Index of a future that is done, None when none is within `timeout` seconds."""
        import ray

        done, _ = ray.wait(futures, num_returns=1, timeout=timeout)
        return futures.index(done[0]) if done else None

    def anew(self) -> "_RayReplica":
        """Ends this one; a new one of the same settings in the same place."""
        self.stop()
        return _RayReplica(*self._made_of)

    def result(self, future) -> Any:
        import ray

        try:
            return _with_log(self, ray.get(future))
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


def _with_log(replica, fact: Any) -> Any:
    """The result of a call; a start's result names the replica's log."""
    if isinstance(fact, dict) and "log" in fact:
        replica.log_file = fact["log"]
    return fact


def _explain(name: str, error: Exception, log_file: str) -> Exception:
    """A ValueError stays one (the user's settings); a death is a ReplicaDied; both others quote the replica's log."""
    if type(error) is ValueError:
        return ValueError(f"{name}: {error}")
    tail = ""
    if log_file and os.path.isfile(log_file):  # the replica may be on another node
        with open(log_file, errors="replace") as file:
            tail = f"\nlast lines of {log_file}:\n" + "".join(deque(file, maxlen=_LOG_LINES))
    # A dead engine is known by name: its class is vLLM's, which this process does not import.
    names = {kind.__name__ for kind in type(error).__mro__}
    dead = names & {"EngineDeadError", "ActorDiedError", "RayActorError"}
    return (ReplicaDied if dead else RuntimeError)(f"{name} failed: {type(error).__name__}: {error}{tail}")
