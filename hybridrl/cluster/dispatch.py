"""Who gets what when the driver calls a worker's method on a whole group.

all    every rank runs it with the same arguments; the driver gets a list in rank order
first  rank 0 alone runs it; the driver gets its result
dp     the first argument that is a `Shares` has one entry a data-parallel rank; all ranks of a data-parallel rank's
       model-parallel group get theirs, and the driver gets one result each, from the rank on the last pipeline stage
"""

from collections.abc import Callable
from typing import Any, Literal

Mode = Literal["all", "first", "dp"]


class Shares(list):
    """One argument a data-parallel rank."""


def dispatch(mode: Mode) -> Callable:
    """Marks a worker's method."""

    def mark(method: Callable) -> Callable:
        method.dispatch_mode = mode
        return method

    return mark


class WorkerGroup:
    """A pool of ranks behind method calls. `executor` starts them and runs a method on one; see local.py and ray.py.

    `group.method(...)` calls the worker's method as it is marked and waits. `group.submit("method", ...)` returns at
    once with a function that waits.
    """

    def __init__(self, executor, worker_class: type):
        self.executor, self.worker_class = executor, worker_class
        self.coords: list = []

    @property
    def dp(self) -> int:
        return self.coords[0].dp

    def start(self) -> "WorkerGroup":
        """Ranks join each other and build their models. Collective."""
        self.coords = self.submit("setup", self.rendezvous())()
        return self

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_") or not hasattr(getattr(self.worker_class, name, None), "dispatch_mode"):
            raise AttributeError(f"{self.worker_class.__name__} has no dispatched method {name!r}")
        return lambda *args: self.submit(name, *args)()

    def submit(self, name: str, *args: Any) -> Callable[[], Any]:
        """Starts the method on its ranks; the returned function waits for and gives the result."""
        mode = getattr(self.worker_class, name).dispatch_mode
        ranks = range(1) if mode == "first" else range(self.executor.world)
        if mode == "dp":
            stored = [Shares(self.executor.put(x) for x in a) if isinstance(a, Shares) else a for a in args]
            pending = [self.executor.run(r, name, *self._arguments(stored, self.coords[r].dp_rank)) for r in ranks]
        else:
            pending = [self.executor.run(r, name, *args) for r in ranks]

        def wait() -> Any:
            results = self.executor.wait(pending)
            if mode == "first":
                return results[0]
            if mode == "dp":
                chosen = {c.dp_rank: r for c, r in zip(self.coords, results, strict=True) if c.is_collector}
                return [chosen[i] for i in range(self.dp)]
            return results

        return wait

    @staticmethod
    def _arguments(args: list, dp_rank: int) -> list:
        return [a[dp_rank] if isinstance(a, Shares) else a for a in args]

    def check(self) -> None:
        """ProcessDied if a rank's process is gone; for use while the ranks have nothing to do."""
        self.executor.check()

    def shutdown(self) -> None:
        """Ends the ranks' processes."""
        self.executor.shutdown()
