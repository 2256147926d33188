"""A reward process: reads samples from the pipe of its parent, answers one result for each.

Started by manager.py as `python worker.py FD`. It is a plain program, no multiprocessing child: those import the
parent's main module first, and with it torch and all else that a trainer needs and a reward does not.
"""

import fcntl
import json
import math
import os
import select
import signal
import sys
from multiprocessing.connection import Connection
from numbers import Real


def die_with_parent() -> None:
    """Standard input is a pipe that the parent never writes to: when the parent is gone, so are we.

    The kernel's SIGIO ends the process whatever it does then, even in C code that holds the interpreter's lock.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # the parent died before the line above
        os._exit(1)


def judge(function, sample: tuple) -> tuple:
    """Score one (data_source, solution, ground_truth, extra_info JSON).

    Returns ("ok", score, {name: number}) or ("error", message, None); never raises.
    """
    data_source, solution, ground_truth, extra_info = sample
    try:
        result = function(data_source=data_source, solution_str=solution, ground_truth=ground_truth,
                          extra_info=json.loads(extra_info))
        extras = {}
        if isinstance(result, dict):
            extras = {k: float(v) for k, v in result.items() if k != "score" and _is_number(v)}
            result = result.get("score")
        if not _is_number(result) or not math.isfinite(result):
            return "error", f"the function returned {result!r:.200} as the score, not a finite number", None
        return "ok", float(result), extras
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: nothing of a sample may end the worker
        return "error", f"{type(error).__name__}: {error}"[:500], None


def _is_number(value) -> bool:
    if isinstance(value, Real):  # Python's numbers and NumPy's
        return True
    return getattr(value, "ndim", None) == 0 and hasattr(value, "item") and isinstance(value.item(), Real)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the parent decides what it means
    die_with_parent()
    pipe = Connection(int(sys.argv[1]))
    path, custom_path, custom_name = pipe.recv()
    sys.path[:] = path
    # Only now: the parent's import path says where the package is.
    from hybridrl.rewards.registry import find, load_custom

    try:
        custom = load_custom(custom_path, custom_name) if custom_path else None
    except ValueError as error:
        pipe.send(("refused", str(error), None))
        return
    pipe.send(("started", None, None))
    while True:
        try:
            samples = pipe.recv()
        except EOFError:
            return
        functions = {source: custom or find(source) for source in {s[0] for s in samples}}
        pipe.send(("ready", None, None))  # a sample's time counts from here, not from a first import
        for sample in samples:
            pipe.send(judge(functions[sample[0]], sample))


if __name__ == "__main__":
    main()
