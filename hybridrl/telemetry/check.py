"""Gate on a run's outcome, from its own metrics.

    python -m hybridrl.telemetry.check RUN_DIR --metric val-core/arithmetic/acc/mean@1 --min-final 0.7 --min-ratio 2.0

Prints the metric's first, best and last value and the verdict. Exit status: 0 passed, 1 not met, 2 could not be judged.
"""

import argparse
import difflib
import math
import sys
from dataclasses import dataclass

from hybridrl.telemetry.history import History, load_history


@dataclass(frozen=True)
class Verdict:
    """`failures` holds one sentence for each demand that is not met; none: passed."""

    first: tuple[int, float]
    last: tuple[int, float]
    best: tuple[int, float]
    failures: tuple[str, ...]


def _series(history: History, metric: str) -> list[tuple[int, float]]:
    steps, values = history.series(metric)
    if not steps:
        names = history.names()
        near = difflib.get_close_matches(metric, names, n=8, cutoff=0.4) or names
        # Validation metrics are what a gate is nearly always about, and a run has few of them.
        offered = list(dict.fromkeys([name for name in names if name.startswith("val-core/")] + near))
        raise ValueError(f"the run has no metric {metric!r}; it has {', '.join(offered) or 'none at all'}")
    return list(zip(steps, values, strict=True))


def judge(history: History, metric: str, min_final: float | None = None, min_ratio: float | None = None) -> Verdict:
    """Hold the metric's last value against `min_final` and against `min_ratio` times its first value.

    From a first value of 0 any positive last value meets a ratio. ValueError if the metric is missing.
    """
    points = _series(history, metric)
    finite = [point for point in points if math.isfinite(point[1])]
    first, last = points[0], points[-1]
    best = max(finite, key=lambda point: point[1]) if finite else last
    failures = []
    if not math.isfinite(last[1]):
        failures.append(f"the last value of {metric} (step {last[0]}) is not a number")
    elif min_final is not None and last[1] < min_final:
        failures.append(f"{metric} ended at {last[1]:.4g}, below the {min_final:.4g} demanded")
    if min_ratio is not None and math.isfinite(last[1]):
        if len(points) < 2:
            failures.append(f"{metric} was measured once (step {first[0]}): a ratio needs a value before and one after")
        elif not math.isfinite(first[1]):
            failures.append(f"the first value of {metric} (step {first[0]}) is not a number")
        elif first[1] == 0 and last[1] <= 0:
            failures.append(f"{metric} was 0 at first and did not rise")
        elif first[1] != 0 and last[1] < min_ratio * first[1]:
            ratio = last[1] / first[1]
            failures.append(f"{metric} went from {first[1]:.4g} to {last[1]:.4g}: x{ratio:.2f}, below x{min_ratio:.4g}")
    return Verdict(first, last, best, tuple(failures))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybridrl.telemetry.check", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", help="the run's folder (trainer.default_local_dir)")
    parser.add_argument("--metric", required=True, help="a name in metrics.jsonl")
    parser.add_argument("--min-final", type=float, help="smallest last value that passes")
    parser.add_argument("--min-ratio", type=float, help="smallest last / first that passes")
    arguments = parser.parse_args(argv)
    if arguments.min_final is None and arguments.min_ratio is None:
        parser.error("nothing to check: give --min-final, --min-ratio or both")
    try:
        verdict = judge(load_history(arguments.run_dir), arguments.metric, arguments.min_final, arguments.min_ratio)
    except ValueError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    print(arguments.metric)
    for word, (step, value) in (("first", verdict.first), ("best", verdict.best), ("last", verdict.last)):
        print(f"  {word:<5}  {value:8.4f}   step {step}")
    for failure in verdict.failures:
        print(f"FAILED: {failure}")
    if not verdict.failures:
        print("PASSED")
    return 1 if verdict.failures else 0


if __name__ == "__main__":
    sys.exit(main())
