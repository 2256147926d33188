"""Errors that several parts raise."""


class ProcessDied(RuntimeError):
    """A process of the run is gone and the run cannot go on without it. The message says which one."""
