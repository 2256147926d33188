"""Trackers of other programs: Weights & Biases and MLflow. Imported only by who asks for them.

Logging in is theirs: `wandb login` or WANDB_API_KEY, or WANDB_MODE=offline; MLFLOW_TRACKING_URI, else files in the run
folder. A resumed run goes on in the same run of theirs: its id is kept in the run folder.
"""

import importlib.util
import os
from pathlib import Path

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}


def check_installed(name: str) -> None:
    """ValueError with the mend if the package of a tracker is not there."""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        raise ValueError(
            f"trainer.logger: {name!r} needs a package that is not installed: pip install {PACKAGES[name]}"
        )


class Wandb:
    """A run of W&B; `config` becomes its configuration."""

    def __init__(self, folder: Path, project: str, experiment: str, config: dict | None, resume_step: int | None):
        import wandb

        kept = _kept_id(folder / "wandb_run_id", resume_step)
        self._run = wandb.init(
            project=project, name=experiment, dir=str(folder), config=config, id=kept, resume="allow" if kept else None
        )
        (folder / "wandb_run_id").write_text(self._run.id)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, of the experiment that `project` names."""

    def __init__(self, folder: Path, project: str, experiment: str, config: dict | None, resume_step: int | None):
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = f"file://{(folder / 'mlruns').absolute()}"
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions want a database else
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._id = _kept_id(folder / "mlflow_run_id", resume_step)
        if self._id is None:
            found = self._client.get_experiment_by_name(project)
            owner = found.experiment_id if found else self._client.create_experiment(project)
            self._id = self._client.create_run(owner, run_name=experiment).info.run_id
            (folder / "mlflow_run_id").write_text(self._id)
            for name, value in _flat(config or {}):
                self._client.log_param(self._id, name, str(value)[:500])

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            # verl's names have an @, which MLflow does not take
            self._client.log_metric(self._id, name.replace("@", "_at_"), value, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._id, text, f"{name}/step_{step}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _kept_id(path: Path, resume_step: int | None) -> str | None:
    return path.read_text().strip() if resume_step is not None and path.is_file() else None


def _flat(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value
