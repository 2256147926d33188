"""Ends an engine's processes when the process that owns the engine is gone, however it died.

    python -I -S reaper.py KEY=VALUE      (standard input: a pipe whose write end only the owner holds)

vLLM's engine process does not notice that its parent was killed: it would keep its memory for ever. The engine is
started with KEY=VALUE in its environment, which all its descendants inherit. At the end of the pipe (the owner closed
it or died) whatever still carries that mark is asked to end, and killed if it does not. Standard library only, so that
it costs a few megabytes and starts at once; it detaches itself, so that nobody's clean-up of children takes it first.
"""

import os
import signal
import sys
import time

GRACE_S = 3.0


def marked_pids(mark: str) -> list[int]:
    """Processes started with `mark` (KEY=VALUE) in their environment, this one left out."""
    needle, pids = mark.encode(), []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if needle in file.read().split(b"\0"):
                    pids.append(int(name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return pids


def end_marked(mark: str, grace_s: float = GRACE_S) -> None:
    """SIGTERM to every marked process, SIGKILL after `grace_s` to those that are left."""
    deadline, asked = time.monotonic() + grace_s, set()
    while pids := marked_pids(mark):
        late = time.monotonic() > deadline
        for pid in pids:
            if pid in asked and not late:
                continue
            asked.add(pid)
            try:
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def main() -> None:
    """Wait for the pipe's end, then clear up."""
    mark = sys.argv[1]
    if os.fork():
        os._exit(0)  # the owner waits for this one; the child belongs to init
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C for the whole terminal is not the owner's end
    sys.stdin.buffer.read()
    end_marked(mark)


if __name__ == "__main__":
    main()
