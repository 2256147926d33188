"""One vLLM engine: token ids in, token ids and their log-probs out, weights replaced while it stays up."""

import asyncio
import logging
import multiprocessing.resource_tracker
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hybridrl.data.trajectories import Trajectories, jagged
from hybridrl.rollout import reaper
from hybridrl.rollout.sampling import SamplingSettings

logger = logging.getLogger(__name__)

_MARK = "HYBRIDRL_ENGINE"
_KEY = "actor_rollout_ref.rollout"
DUMMY_VERSION = -1  # weight_version of responses drawn from load_format=dummy's random weights


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What an engine is started with. Sizes are tokens and sequences; memory is GiB.

    model_path: a Hugging Face folder; load_format "dummy" takes only its configuration and starts with random weights.
    enforce_eager: None means true on CPU (compilation costs half a minute there and gains nothing on small models) and
        false on GPUs.
    gpu_memory_utilization: share of the GPU, unused on CPU; cpu_kvcache_gib: the KV cache on CPU, unused on GPUs.
    enable_chunked_prefill: off on CPU whatever it says, for vLLM's engine dies there when it cuts the prefill of a
        request that has a seed; max_num_batched_tokens must then be at least max_model_len.
    omp_threads: threads of each vLLM worker process on CPU. sleep: allow sleep and wake where the platform has them.
    engine_kwargs: any further argument of vLLM's AsyncEngineArgs.
    """

    model_path: str
    tensor_parallel_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    cpu_kvcache_gib: float
    enforce_eager: bool | None
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    load_format: str
    seed: int
    omp_threads: int = 1
    sleep: bool = True
    engine_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not (Path(self.model_path) / "config.json").is_file():
            raise ValueError(f"actor_rollout_ref.model.path={self.model_path}: no config.json there; "
                             "give a Hugging Face model folder")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(f"{_KEY}.max_num_batched_tokens={self.max_num_batched_tokens} is below "
                             f"{_KEY}.max_num_seqs={self.max_num_seqs}: a step decodes one token a sequence")
        if not self.enable_chunked_prefill:
            self.check_whole_prefill("")

    def check_whole_prefill(self, why: str) -> None:
        """ValueError if a prompt of max_model_len tokens would not fit in one step without chunked prefill."""
        if self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(f"{_KEY}.max_num_batched_tokens={self.max_num_batched_tokens} is below "
                             f"{_KEY}.max_model_len={self.max_model_len}, without chunked prefill{why}: raise it")


def base_environment(settings: ServerSettings) -> dict[str, str]:
    """What must be in the environment before vLLM is imported, in the engine's process and its children.

    A VLLM_LOGGING_LEVEL that is set already stays, so that a user can see more.
    """
    return {
        "OMP_NUM_THREADS": str(settings.omp_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each worker claims whole cores that the trainer uses too
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it is not batch-invariant and can't return processed log-probs
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork copies the owner's threads and CUDA state
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "SPT_NOENV": "1",  # vLLM renames its processes, which would overwrite the mark that the reaper looks for
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def engine_arguments(settings: ServerSettings) -> dict[str, Any]:
    """Arguments of vLLM's engine (AsyncEngineArgs, LLM) for `settings` on this machine's platform. Imports vLLM."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    s, on_cpu = settings, current_platform.is_cpu()
    arguments = dict(
        model=s.model_path, load_format=s.load_format, dtype=s.dtype, seed=s.seed,
        tensor_parallel_size=s.tensor_parallel_size,
        # Named, because inside a Ray actor vLLM would pick Ray and ask it for GPUs.
        distributed_executor_backend="uni" if s.tensor_parallel_size == 1 else "mp",
        max_model_len=s.max_model_len, max_num_seqs=s.max_num_seqs, max_num_batched_tokens=s.max_num_batched_tokens,
        enable_prefix_caching=s.enable_prefix_caching,
        enable_chunked_prefill=s.enable_chunked_prefill and not on_cpu,
        enforce_eager=on_cpu if s.enforce_eager is None else s.enforce_eager,
        enable_sleep_mode=s.sleep and current_platform.is_sleep_mode_available(),
        skip_tokenizer_init=True, logprobs_mode="processed_logprobs",
        disable_log_stats=True, use_tqdm_on_load=False,
    )
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = int(s.cpu_kvcache_gib * 2**30)
    else:
        arguments["gpu_memory_utilization"] = s.gpu_memory_utilization
    for name in s.engine_kwargs:
        if name in arguments:
            raise ValueError(f"{_KEY}.engine_kwargs.vllm.{name}: set by a key of its own, remove it here")
        if name not in {known.name for known in fields(AsyncEngineArgs)}:
            raise ValueError(f"{_KEY}.engine_kwargs.vllm.{name}: this vLLM's AsyncEngineArgs has no such argument")
    return arguments | s.engine_kwargs


class VllmServer:
    """Runs vLLM's AsyncLLM in this process's event loop; the engine itself lives in processes of its own.

    Every method is a coroutine of that one loop, so a Ray actor of this class and the local executor use it alike.
    `env` is set while the engine's processes start (CUDA_VISIBLE_DEVICES picks their devices).
    """

    def __init__(self, settings: ServerSettings, env: dict[str, str] | None = None):
        self.settings = settings
        self._env = env or {}
        self._engine = None
        self._on_cpu = False
        self._can_sleep = False
        self._version = DUMMY_VERSION if settings.load_format == "dummy" else 0
        self._running = 0  # requests inside generate()
        self._requests = 0  # so far, for unique request ids
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        self._reaper: subprocess.Popen | None = None

    async def start(self) -> dict[str, Any]:
        """Bring the engine up. Returns facts: pid, seconds, log (this process's stderr file or ""), sleep (bool)."""
        assert self._engine is None, "the server is up already"
        began = time.monotonic()
        # The first spawn of a process starts this tracker, which outlives the engine: start it without the mark.
        multiprocessing.resource_tracker.ensure_running()
        self._reaper = subprocess.Popen([sys.executable, "-I", "-S", reaper.__file__, self._mark],
                                        stdin=subprocess.PIPE, close_fds=True)
        self._reaper.wait()  # it detached
        with _environment(base_environment(self.settings) | self._env | dict([self._mark.split("=")])):
            from vllm.platforms import current_platform

            self._on_cpu = current_platform.is_cpu()
            self._can_sleep = self.settings.sleep and current_platform.is_sleep_mode_available()
            if self._on_cpu:
                self.settings.check_whole_prefill(", which vLLM can't do on CPU for requests with a seed")
                os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and it would beat cpu_kvcache_gib
                if engine_arguments(self.settings)["enforce_eager"]:
                    # vLLM compiles a few helpers of its sampler even so: 16 s of C++ at the first request.
                    os.environ["TORCHDYNAMO_DISABLE"] = "1"
            self._engine = self._make_engine()
            if self.settings.load_format == "dummy":
                # The dummy loader can't reload; from here on weights come from files.
                await self._engine.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
        seconds = time.monotonic() - began
        return {"pid": os.getpid(), "seconds": seconds, "log": _stderr_file(), "sleep": self._can_sleep}

    def _make_engine(self):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        config = AsyncEngineArgs(**engine_arguments(self.settings)).create_engine_config()
        if self._on_cpu and self.settings.tensor_parallel_size == 1:
            # On CPU vLLM turns "uni" into "mp" to bind threads, which nobind turns off: save that process and 7 s.
            config.parallel_config.distributed_executor_backend = "uni"
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    async def generate(self, prompts: pa.Table, sampling: SamplingSettings, step: int) -> pa.Table:
        """Draw one response a row of `prompts` (uid string, sample int32, prompt_ids list<int32>), in its order.

        Returns uid, sample, response_ids list<int32> (an end-of-sequence token that was drawn is its last),
        rollout_logprobs list<float32> (of those tokens), finish_reason ("stop" or "length"), weight_version int32.
        ValueError: an empty prompt, a prompt that leaves no room for max_tokens, or two rows of one (uid, sample).
        """
        table = Trajectories(prompts.select(["uid", "sample", "prompt_ids"]))
        uids, samples = table.scalars("uid").tolist(), table.scalars("sample").tolist()
        values, offsets = table.flat("prompt_ids")
        self._check(uids, samples, np.diff(offsets), sampling)
        version = self._version
        self._running += len(table)
        tasks = [asyncio.ensure_future(self._one(values[offsets[i]:offsets[i + 1]].tolist(), uids[i], samples[i],
                                                 sampling, step)) for i in range(len(table))]
        try:
            outputs = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()  # aborts the request in the engine
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self._running -= len(table)
        bounds = np.concatenate([[0], np.cumsum([len(ids) for ids, _, _ in outputs])]).astype(np.int64)
        return table.with_columns(
            response_ids=jagged(np.array([t for ids, _, _ in outputs for t in ids], np.int32), bounds),
            rollout_logprobs=jagged(np.array([p for _, probs, _ in outputs for p in probs], np.float32), bounds),
            finish_reason=[reason for _, _, reason in outputs],
            weight_version=np.full(len(table), version, np.int32),
        ).table.drop_columns(["prompt_ids"])

    def _check(self, uids: list[str], samples: list[int], lengths: np.ndarray, sampling: SamplingSettings) -> None:
        if len(set(zip(uids, samples))) != len(uids):
            raise ValueError("two rows of a batch have the same (uid, sample): they would draw the same response")
        if len(lengths) and lengths.min() == 0:
            raise ValueError(f"prompt {uids[int(lengths.argmin())]} is empty: a response needs a prompt token")
        room = self.settings.max_model_len - sampling.max_tokens
        if len(lengths) and lengths.max() > room:
            raise ValueError(f"prompt {uids[int(lengths.argmax())]} has {lengths.max()} tokens, but "
                             f"{_KEY}.max_model_len={self.settings.max_model_len} less the response's "
                             f"{sampling.max_tokens} leaves {room}: raise {_KEY}.max_model_len or lower "
                             "data.max_response_length")

    async def _one(self, prompt_ids: list[int], uid: str, sample: int, sampling: SamplingSettings, step: int):
        """One request: (response ids, their log-probs, finish reason)."""
        from vllm.inputs import tokens_input

        self._requests += 1
        final = None
        # An input that is rendered already skips vLLM's tokenizer thread pool.
        async for output in self._engine.generate(tokens_input(prompt_ids), sampling.vllm_params(uid, sample, step),
                                                  f"{self._requests}-{uid}-{sample}"):
            final = output
        (result,) = final.outputs
        if result.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {uid}/{sample} with {result.finish_reason!r}")
        ids, logprobs = result.token_ids, result.logprobs.logprobs
        assert len(ids) == len(logprobs), f"{len(ids)} tokens but {len(logprobs)} log-probs"
        return ids, logprobs, result.finish_reason

    async def update_weights(self, path: str, version: int) -> dict[str, float]:
        """Load the Hugging Face folder `path` over the weights, layer by layer, and drop every cached prefix.

        Returns {"seconds", "bytes"} (bytes read). RuntimeError while requests run: they would mix two versions.
        """
        files = sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path}: no *.safetensors there; weights are taken from a Hugging Face folder")
        if self._running:
            raise RuntimeError(f"weights cannot change while {self._running} requests run")
        began = time.monotonic()
        await self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        if not await self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM refused to drop its prefix cache: entries of the old weights would be reused")
        self._version = version
        return {"seconds": time.monotonic() - began, "bytes": float(sum(file.stat().st_size for file in files))}

    async def sleep(self, level: int = 2) -> bool:
        """Free the engine's device memory (2: weights too, 1: weights to the host). False where it can't be done."""
        if self._can_sleep:
            await self._engine.sleep(level)
        else:
            logger.info("sleep skipped: %s", "switched off" if not self.settings.sleep else "this platform has none")
        return self._can_sleep

    async def wake(self, tags: list[str]) -> bool:
        """Take device memory back for `tags`: "weights" first, write them, then "kv_cache". False as for `sleep`."""
        if self._can_sleep:
            await self._engine.wake_up(tags)
        return self._can_sleep

    async def health(self) -> dict[str, Any]:
        """{"weight_version", "running"}; raises vLLM's EngineDeadError once the engine has died."""
        await self._engine.check_health()
        return {"weight_version": self._version, "running": self._running}

    async def shutdown(self) -> None:
        """End the engine and wait until none of its processes is left. May be called twice, or without start()."""
        if self._engine is not None:
            self._engine.shutdown(timeout=10)
            self._engine = None  # now, while the interpreter is whole: its destructor shuts down again
        if self._reaper is not None:
            self._reaper.stdin.close()
            self._reaper = None
            deadline = time.monotonic() + 4 * reaper.GRACE_S
            # The reaper's own command line is no mark: it has the mark as an argument, not in its environment.
            while reaper.marked_pids(self._mark):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"vLLM processes outlived their engine: {reaper.marked_pids(self._mark)}")
                await asyncio.sleep(0.02)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """os.environ with `values`, put back as it was afterwards (vLLM changes some more of it on the way)."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for key in os.environ.keys() | before.keys():
            if key not in before:
                del os.environ[key]
            elif os.environ.get(key) != before[key]:
                os.environ[key] = before[key]


def _stderr_file() -> str:
    """The file behind this process's stderr (Ray redirects it), "" where it is a terminal or a pipe."""
    try:
        target = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return target if os.path.isfile(target) else ""
