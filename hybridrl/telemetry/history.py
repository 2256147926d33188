"""A run's metrics.jsonl, read back: one JSON object a line, {"step": int, "metrics": {name: number or null}}."""

import json
from dataclasses import dataclass, field
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


@dataclass
class History:
    """Metrics by step. Lines of the same step are merged, the later line winning; null is NaN."""

    by_step: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return sorted(self.by_step)

    def names(self) -> list[str]:
        """All metric names, in order of first appearance."""
        return list(dict.fromkeys(name for step in self.steps for name in self.by_step[step]))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps that have the metric, and its values there (NaN kept); two empty lists for an unknown name."""
        steps = [step for step in self.steps if name in self.by_step[step]]
        return steps, [self.by_step[step][name] for step in steps]


def read_records(path: Path) -> list[dict]:
    """The whole lines of a metrics file, in order.

    A last line without its line break was being written when the run was killed: it is left out. ValueError on any
    other line that is not a record.
    """
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["step"], record["metrics"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}, line {number}: not a {{"step": .., "metrics": ..}} record') from error
        records.append(record)
    return records


def load_history(run_dir: str | Path) -> History:
    """History of a run folder; ValueError if it has no metrics.jsonl."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the run's folder (trainer.default_local_dir)")
    history = History()
    for record in read_records(path):
        step = history.by_step.setdefault(record["step"], {})
        for name, value in record["metrics"].items():
            step[name] = float("nan") if value is None else float(value)
    return history
