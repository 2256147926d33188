"""Where a step's time and memory go: a timer for named phases, and what this process and machine hold."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

GIB = 1024**3


class PhaseTimer:
    """Seconds per phase of one step.

    `with timer("gen"): ...` adds the elapsed time to `seconds["gen"]`; entering a phase again adds to it. A phase
    inside another is filed under both names ("update_actor/forward"), so that the names without a slash sum up to the
    step. "step" is the frame around all of them and prefixes nothing. `on_phase` is called with each name at its
    start: the progress bar shows it.
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None):
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._on_phase = on_phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name != "step":
            self._open.append(name)
        path = "step" if name == "step" else "/".join(self._open)
        if self._on_phase is not None and name != "step":
            self._on_phase(path)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[path] = self.seconds.get(path, 0.0) + time.perf_counter() - start
            if name != "step":
                self._open.pop()

    def drain(self) -> dict[str, float]:
        """The seconds so far; the timer starts again from nothing."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def process_rss_gb() -> float:
    """Resident memory of this process now, GiB."""
    return psutil.Process(os.getpid()).memory_info().rss / GIB


def process_peak_rss_gb() -> float:
    """Highest resident memory of this process so far, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def memory_metrics(prefix: str = "perf") -> dict[str, float]:
    """{prefix}/... in GiB.

    cpu_memory_used_gb is the whole machine's (as in verl), cpu_memory_rss_gb and cpu_memory_rss_peak_gb this process's;
    max_memory_allocated_gb and max_memory_reserved_gb are this process's peaks on its current GPU, if it uses one.
    """
    out = {
        f"{prefix}/cpu_memory_used_gb": psutil.virtual_memory().used / GIB,
        f"{prefix}/cpu_memory_rss_gb": process_rss_gb(),
        f"{prefix}/cpu_memory_rss_peak_gb": process_peak_rss_gb(),
    }
    # Looked up, not imported: a process that has not loaded torch has no GPU memory to tell of.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        out[f"{prefix}/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / GIB
        out[f"{prefix}/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / GIB
    return out


def hardware_line() -> str:
    """This machine in words: GPUs where nvidia-smi lists them, CPU model, cores usable by this process, memory."""
    parts = _gpu_names()
    parts.append(f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores")
    parts.append(f"{psutil.virtual_memory().total / GIB:.0f} GiB memory")
    return " · ".join(parts)


def _gpu_names() -> list[str]:
    # Not torch.cuda: asking it here would open a CUDA context in the driver process.
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return []
    names = [name.strip() for name in found if name.strip()]
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "CPU"
