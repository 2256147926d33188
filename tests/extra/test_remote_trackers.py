"""W&B offline and MLflow on files, both without a login."""

import json
import time

from hybridrl.telemetry.trackers import Trackers

SAMPLE = {"prompt": ["2+2="], "response": ["5"], "ground_truth": ["4"], "data_source": ["a"], "score": [0.0]}
ABOUT = {"config_dict": {"data": {"seed": 1}}, "hardware": "a machine"}


def logged(name: str, folder, resume_step=None, value: float = 0.5) -> None:
    trackers = Trackers([name], folder, "project", "experiment", resume_step=resume_step, **ABOUT)
    step = (resume_step or 0) + 1
    trackers.log({"critic/score/mean": value, "val-core/a/acc/mean@1": 0.25}, step)
    trackers.log_samples(SAMPLE, step)
    trackers.finish()


def test_mlflow(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as Mlflow sets it, undone after the test
    logged("mlflow", tmp_path)
    logged("mlflow", tmp_path, resume_step=1, value=0.75)  # the same run goes on
    client = mlflow.MlflowClient(tracking_uri=f"file://{tmp_path / 'mlruns'}")
    [run] = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert run.info.run_name == "experiment" and run.info.status == "FINISHED"
    assert run.data.params == {"data.seed": "1"} and run.data.metrics["val-core/a/acc/mean_at_1"] == 0.25
    history = client.get_metric_history(run.info.run_id, "critic/score/mean")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.75)]


def test_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged("wandb", tmp_path)
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # a process of theirs writes it, sometimes after the run's end
    while b"critic/score/mean" not in file.read_bytes():
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.1)
    assert (tmp_path / "wandb_run_id").read_text() in file.name
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["metrics"]["critic/score/mean"] == 0.5
