"""RewardManager: scores samples in a pool of processes, where a bad sample costs itself and nothing else.

Each worker works through a small chunk and answers sample by sample, so the parent knows which one it is at. When that
one takes longer than the timeout or takes the process down, the worker is killed and replaced, the sample is counted
as failed with score 0, and the rest of the chunk goes back to the queue.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from hybridrl.algorithms import by_path
from hybridrl.rewards import worker
from hybridrl.rewards.registry import check_source

logger = logging.getLogger(__name__)

CHUNK = 16  # samples sent to a worker at once: few enough that workers end together, enough to hide the pipe
START_S = 120.0  # for a worker to start and import what it needs
START_TRIES = 3  # workers lost in a row before any sample was reached


@dataclass
class RewardResult:
    scores: np.ndarray  # [N] float32, in the order given; 0 for a failed sample
    extras: dict[str, np.ndarray]  # other numbers the functions returned, each [N] float32, nan where absent
    failures: list[tuple[int, str, str]]  # (index, "timeout" | "crash" | "error", message), by index
    metrics: dict[str, float] = field(default_factory=dict)


class _Worker:
    """One process, its pipe, and what it is doing."""

    def __init__(self, custom_path: str | None, custom_name: str):
        self.pipe, theirs = Pipe()
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        # A session of its own, so that a kill also reaches what a reward function started.
        # -P: or this folder, first on the import path, would put its math.py before Python's own.
        self.process = subprocess.Popen([sys.executable, "-P", worker.__file__, str(theirs.fileno())], env=env,
                                        stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self.pipe.send((sys.path, custom_path, custom_name))
        self.chunk: deque[int] = deque()
        self.ready = False  # "ready" was heard for the present chunk: its first sample is under way
        self.gone = False  # its end of the pipe is closed
        self.deadline = time.monotonic() + START_S

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.process.stdin.close()
        self.pipe.close()


class RewardManager:
    """A pool of `num_workers` processes that outlives the calls of `score`; `close` it, or use it in a `with`.

    timeout_s: seconds a sample may take. custom_path, custom_name: a Python file and the function in it that scores
    every sample, instead of the built-in ones chosen by data_source. Thread-safe; the processes end with their parent.
    ValueError: a number out of range, or a custom function that is missing or unfit (see registry.load_custom).
    """

    def __init__(self, num_workers: int, timeout_s: float, custom_path: str | None = None,
                 custom_name: str = "compute_score"):
        if num_workers < 1:
            raise ValueError(f"reward.num_workers={num_workers}: at least 1")
        if not timeout_s > 0:
            raise ValueError(f"reward.timeout_s={timeout_s}: must be above 0 seconds")
        self.timeout_s = timeout_s
        if custom_path and not by_path.is_path(custom_path):
            custom_path = str(Path(custom_path).expanduser().absolute())
        self._custom = (custom_path, custom_name)
        self._lock = threading.Lock()
        self._lost = 0  # workers lost in a row while starting
        self._workers: list[_Worker] = []
        try:
            self._workers += [_Worker(*self._custom) for _ in range(num_workers)]
            self._await_first()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RewardManager":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _await_first(self) -> None:
        """Wait until one worker has imported the custom function: a faulty one is refused here."""
        first = self._workers[0]
        kind, message = "lost", None
        try:
            if first.pipe.poll(START_S):
                kind, message, _ = first.pipe.recv()
        except (EOFError, OSError):
            pass
        if kind == "refused":
            raise ValueError(message)
        if kind == "lost" and self._custom[0]:
            raise ValueError(f"custom_reward_function.path: importing {self._custom[0]} ended the process or took more "
                             f"than {START_S:.0f} s: import the file by hand to see why")
        if kind == "lost":
            raise RuntimeError("a reward process did not start; its standard error says why")

    def check(self, data_sources: list[str]) -> None:
        """ValueError when one of `data_sources` has no function."""
        if not self._custom[0]:
            for source in set(data_sources):
                check_source(source)

    def score(self, data_source: list[str], solution: list[str], ground_truth: list[str],
              extra_info: list[str]) -> RewardResult:
        """Score N samples; extra_info is JSON text. ValueError when a data source has no function."""
        self.check(data_source)
        samples = list(zip(data_source, solution, ground_truth, extra_info, strict=True))
        with self._lock:
            assert self._workers, "the manager is closed"
            try:
                answers = self._run(samples)
            except BaseException:  # Ctrl-C, say: half-answered chunks must not mix with a later call's
                self.close()
                raise
        return _result(answers)

    def _run(self, samples: list[tuple]) -> list[tuple]:
        """The workers' answers, one a sample."""
        answers: list[tuple | None] = [None] * len(samples)
        todo = deque(range(len(samples)))
        left = len(samples)
        while left:
            for place, w in enumerate(self._workers):
                if not w.chunk and todo and not self._send(w, samples, todo):
                    self._replace(place, todo)
            busy = {w.pipe: place for place, w in enumerate(self._workers) if w.chunk}
            slack = min((self._workers[p].deadline for p in busy.values()), default=0) - time.monotonic()
            for pipe in wait(list(busy), timeout=min(max(slack, 0), 0.5)):
                left -= self._receive(self._workers[busy[pipe]], answers)
            for place, w in enumerate(self._workers):
                if not w.chunk or not w.gone and time.monotonic() < w.deadline:
                    continue
                if w.ready:
                    answers[w.chunk.popleft()] = self._blame(w)
                    left -= 1
                self._replace(place, todo)
        return answers

    def _send(self, w: _Worker, samples: list[tuple], todo: deque[int]) -> bool:
        """Give an idle worker its next chunk. False when it turns out to be dead."""
        share = min(CHUNK, -(-len(todo) // len(self._workers)))
        w.chunk = deque(todo.popleft() for _ in range(share))
        w.ready, w.deadline = False, time.monotonic() + START_S
        try:
            w.pipe.send([samples[i] for i in w.chunk])
        except (OSError, EOFError):
            return False
        return True

    def _receive(self, w: _Worker, answers: list) -> int:
        """Take one message of a worker; returns how many samples it answered (0 or 1)."""
        try:
            kind, value, extras = w.pipe.recv()
        except (EOFError, OSError):
            w.gone = True
            return 0
        if kind == "refused":  # the file was changed during the run
            raise ValueError(value)
        if kind == "started":
            return 0
        w.deadline = time.monotonic() + self.timeout_s
        if kind == "ready":
            w.ready = True
            return 0
        self._lost = 0
        answers[w.chunk.popleft()] = (kind, value, extras)
        return 1

    def _blame(self, w: _Worker) -> tuple:
        """The failed answer of the sample that `w` was at."""
        self._lost = 0
        try:
            code = w.process.wait(timeout=1.0 if w.gone else 0)
        except subprocess.TimeoutExpired:
            return "timeout", f"no score within reward.timeout_s={self.timeout_s} s", None
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "crash", f"the reward process ended with {how}", None

    def _replace(self, place: int, todo: deque[int]) -> None:
        """A new process for the worker at `place`; what it had not answered goes back to the front of the queue."""
        old = self._workers[place]
        if not old.ready:
            self._lost += 1
            if self._lost > START_TRIES * len(self._workers):
                raise RuntimeError("reward processes end before they reach a sample (last: "
                                   f"exit code {old.process.poll()}); their standard error says why")
        todo.extendleft(reversed(old.chunk))
        old.stop()
        self._workers[place] = _Worker(*self._custom)

    def close(self) -> None:
        """End all workers. May be called twice."""
        for w in self._workers:
            w.stop()
        self._workers = []


def _result(answers: list[tuple]) -> RewardResult:
    n = len(answers)
    scores = np.zeros(n, np.float32)
    extras: dict[str, np.ndarray] = {}
    failures = []
    for i, (kind, value, numbers) in enumerate(answers):
        if kind != "ok":
            failures.append((i, kind, value))
            continue
        scores[i] = value
        for name, number in numbers.items():
            extras.setdefault(name, np.full(n, np.nan, np.float32))[i] = number
    if failures:
        logger.warning("%d of %d samples could not be scored; the first: sample %d, %s: %s", len(failures), n,
                       *failures[0])
    kinds = [kind for _, kind, _ in failures]
    metrics = {f"reward/num_{name}": float(kinds.count(kind)) for kind, name in
               (("timeout", "timeouts"), ("crash", "crashes"), ("error", "errors"))}
    return RewardResult(scores, extras, failures, metrics)
