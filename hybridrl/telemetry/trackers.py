"""Where a run's metrics and samples go: the terminal, metrics.jsonl, TensorBoard and those of remote.py; by the names
of `trainer.logger`.

The run folder is written here: metrics.jsonl (always: report and gate read it), tensorboard/, config.yaml, run.json,
validation/step_N.parquet.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hybridrl.telemetry.console import StepConsole
from hybridrl.telemetry.history import METRICS_FILE, read_records
from hybridrl.telemetry.phases import hardware_line
from hybridrl.telemetry.remote import Mlflow, Wandb, check_installed

BACKENDS = ("console", "file", "tensorboard", "wandb", "mlflow")
# verl's names that mean the same here, and those that a user may reasonably expect.
NOT_YET = ("swanlab", "vemlp_wandb", "clearml", "trackio")
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"


def check_loggers(loggers: list[str] | tuple[str, ...] | str) -> list[str]:
    """The names as a list; ValueError naming trainer.logger and the choices if one of them is no tracker,
    or the package to install."""
    names = [loggers] if isinstance(loggers, str) else list(loggers)
    for name in names:
        if name not in BACKENDS:
            known = f"trainer.logger takes any of {', '.join(BACKENDS)}"
            why = "is not there yet" if name in NOT_YET else "is no tracker"
            raise ValueError(f"trainer.logger: {name!r} {why}; {known} (metrics.jsonl is always written)")
        check_installed(name)
    return names


def scalar(name: str, value: Any) -> int | float:
    """A plain number from an int, a float, a NumPy scalar or a tensor of one element; ValueError on anything else."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"metric {name!r} is no number: {value!r}")
    return value


class MetricsFile:
    """metrics.jsonl: a line a call, flushed at once, so that a killed run keeps all but the step it was in.

    `resume_step` continues a file after that step: later lines belong to the lost part of the killed run and are
    dropped. None starts a new file and puts an earlier one aside (metrics.previous-1.jsonl), never over it.
    """

    def __init__(self, path: Path, resume_step: int | None):
        if path.exists() and resume_step is None:
            _put_aside(path)
        elif path.exists():
            kept = [record for record in read_records(path) if record["step"] <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, float], step: int) -> None:
        # NaN and infinity are not JSON: null keeps the file readable by everything else.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "metrics": finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files; on resume TensorBoard hides what was logged beyond `resume_step`."""

    def __init__(self, folder: Path, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter  # two seconds to import: only for those who ask for it

        if folder.exists() and resume_step is None:
            _put_aside(folder)
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_text(self, name: str, text: str, step: int) -> None:
        # TensorBoard renders Markdown: four spaces in front make it verbatim.
        self._writer.add_text(name, "\n".join("    " + line for line in text.split("\n")), step)

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """All trackers of a run behind one object.

    loggers: names from trainer.logger. config_dict: the resolved config as plain dicts and lists, written to
    config.yaml. total_steps: for the progress bar. resume_step: the step of the checkpoint that the run continues
    from, None for a new run. hardware: one line for the report, by default this machine's. others: further
    trackers, with log, log_text and close. ValueError for an unknown logger, before anything is written.
    """

    def __init__(
        self,
        loggers: list[str] | tuple[str, ...] | str,
        run_dir: str | Path,
        project_name: str,
        experiment_name: str,
        config_dict: dict[str, Any] | None = None,
        total_steps: int | None = None,
        resume_step: int | None = None,
        hardware: str | None = None,
        stream: TextIO | None = None,
        others: list[Any] | None = None,
    ):
        names = check_loggers(loggers)
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        run = {"project": project_name, "experiment": experiment_name, "hardware": hardware or hardware_line()}
        (self.run_dir / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        if config_dict is not None:
            text = yaml.safe_dump(config_dict, sort_keys=False, allow_unicode=True)
            (self.run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
        self._file = MetricsFile(self.run_dir / METRICS_FILE, resume_step)
        about = (self.run_dir, project_name, experiment_name, config_dict, resume_step)
        self._others: list[Any] = list(others or [])
        if "tensorboard" in names:
            self._others.append(TensorBoard(self.run_dir / "tensorboard", resume_step))
        self._others += [kind(*about) for name, kind in (("wandb", Wandb), ("mlflow", Mlflow)) if name in names]
        self._console = StepConsole(total_steps, stream) if "console" in names else None
        if self._console is not None:
            self._console.start(resume_step or 0)

    @property
    def on_phase(self) -> Callable[[str], None]:
        """For `PhaseTimer`: shows the running phase beside the progress bar."""
        return self._console.phase if self._console is not None else lambda name: None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """One step's metrics to every tracker; numbers, NumPy scalars or tensors of one element."""
        numbers = {name: scalar(name, value) for name, value in metrics.items()}
        self._file.log(numbers, step)
        for other in self._others:
            other.log(numbers, step)
        if self._console is not None:
            self._console.log(numbers, step)

    def log_samples(self, samples: dict[str, list] | pa.Table, step: int, show: int = 1) -> Path:
        """A validation's generations to validation/step_N.parquet; the first `show` also to the terminal and to the
        trackers that take text.

        Columns: prompt, response, ground_truth, data_source (strings), score, acc (float); more pass through. Returns
        the file's path.
        """
        table = samples if isinstance(samples, pa.Table) else pa.table(samples)
        path = self.run_dir / "validation" / f"step_{step}.parquet"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        pq.write_table(table, temporary)
        os.replace(temporary, path)
        for number, row in enumerate(table.slice(0, show).to_pylist(), start=1):
            truth, score = row.get("ground_truth"), row.get("score")
            if self._console is not None:
                self._console.sample(f"validation, step {step}", row["prompt"], row["response"], truth, score)
            text = f"prompt\n{row['prompt']}\n\nresponse\n{row['response']}\n\nexpected {truth}, score {score}"
            for other in self._others:
                other.log_text(f"validation/sample_{number}", text, step)
        return path

    def finish(self) -> None:
        """Close the files and take the progress bar down; safe to call twice."""
        self._file.close()
        for other in self._others:
            other.close()
        self._others.clear()
        if self._console is not None:
            self._console.close()


def _put_aside(path: Path) -> None:
    """Rename to the first free name.previous-K.suffix: a new run in an old folder destroys nothing."""
    number = 1
    while (target := path.with_name(f"{path.stem}.previous-{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
