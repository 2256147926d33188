"""The executor for a debugger: one rank in this very process, no Ray."""

from typing import Any


class LocalExecutor:
    """Runs every call at once, here."""

    world = 1

    def __init__(self, worker_class: type, settings: Any):
        self.worker = worker_class(0, settings)

    def put(self, value: Any) -> Any:
        return value

    def run(self, rank: int, name: str, *args: Any) -> Any:
        assert rank == 0
        return getattr(self.worker, name)(*args)

    def wait(self, pending: list) -> list:
        return pending

    def check(self) -> None:
        """The one rank lives as long as this process."""

    def shutdown(self) -> None:
        self.worker.close()
