"""The trackers: files as they should lie on disk, resume, refusals."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridrl.telemetry.history import load_history
from hybridrl.telemetry.trackers import Trackers, check_loggers


def _open(folder, loggers=("file",), **options):
    return Trackers(list(loggers), folder, "project", "experiment", hardware="a machine", **options)


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_on_disk_at_once_and_strict_json(tmp_path):
    trackers = _open(tmp_path, loggers=[])
    numbers = {"a": np.float32(0.5), "b": torch.tensor(2), "c": float("nan"), "d": math.inf, "e": 3}
    trackers.log(numbers, 1)
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"step": 1, "metrics": {"a": 0.5, "b": 2, "c": None, "d": None, "e": 3}}
    trackers.finish()
    trackers.finish()
    assert math.isnan(load_history(tmp_path).by_step[1]["c"])


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    trackers = _open(tmp_path)
    for step in range(6):
        trackers.log({"m": step}, step)
    trackers.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "metr')  # killed in the middle of a line
    resumed = _open(tmp_path, resume_step=3)
    resumed.log({"m": 40}, 4)
    resumed.finish()
    points = [(line["step"], line["metrics"]["m"]) for line in _lines(tmp_path)]
    assert points == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_new_run_puts_an_old_file_aside(tmp_path):
    for value in (1, 2, 3):
        trackers = _open(tmp_path)
        trackers.log({"m": value}, 1)
        trackers.finish()
    assert _lines(tmp_path)[0]["metrics"] == {"m": 3}
    old = [json.loads((tmp_path / f"metrics.previous-{n}.jsonl").read_text())["metrics"]["m"] for n in (1, 2)]
    assert old == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "metrics": {}}\nrubbish\n{"step": 2, "metrics": {}}\n')
    with pytest.raises(ValueError, match="line 2"):
        load_history(tmp_path)


def test_config_and_run_are_written(tmp_path):
    config = {"trainer": {"logger": ["console"], "total_epochs": 3}, "data": {"train_files": ["ü.parquet"]}}
    _open(tmp_path, config_dict=config).finish()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config
    assert json.loads((tmp_path / "run.json").read_text())["hardware"] == "a machine"


def test_tensorboard_has_the_scalars_and_purges_on_resume(tmp_path):
    first = _open(tmp_path, ["tensorboard"])
    for step in (1, 2, 3):
        first.log({"critic/score/mean": step / 4}, step)
    first.finish()
    second = _open(tmp_path, ["tensorboard"], resume_step=2)
    second.log({"critic/score/mean": 8.0}, 3)
    second.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("critic/score/mean")]
    assert points == [(1, 0.25), (2, 0.5), (3, 8.0)]


def test_samples_become_a_parquet_file(tmp_path, capsys):
    trackers = _open(tmp_path, ["console"])
    samples = {
        "prompt": ["1+1", "2+2"],
        "response": ["2", "[red]5[/red] \x1b[2J"],
        "ground_truth": ["2", "4"],
        "data_source": ["arithmetic"] * 2,
        "score": [1.0, 0.0],
        "acc": [1.0, 0.0],
    }
    path = trackers.log_samples(samples, step=5, show=2)
    trackers.finish()
    assert path == tmp_path / "validation" / "step_5.parquet"
    assert pq.read_table(path).to_pydict() == samples
    shown = capsys.readouterr().out
    assert "[red]5[/red]" in shown and "\x1b" not in shown and "expected 4" in shown


@pytest.mark.parametrize("name", ["swanlab", "clearml", "tensorbord"])
def test_unknown_trackers_name_the_key_and_the_choices(tmp_path, name):
    with pytest.raises(ValueError, match=r"trainer\.logger.*console, file, tensorboard") as error:
        _open(tmp_path / "run", ["console", name])
    assert ("not there yet" in str(error.value)) == (name != "tensorbord")
    assert not (tmp_path / "run").exists()


def test_a_single_name_is_a_list_of_one():
    assert check_loggers("console") == ["console"]


@pytest.mark.parametrize("value", ["0.5", None, True, [1.0]])
def test_what_is_no_number_is_refused(tmp_path, value):
    trackers = _open(tmp_path)
    with pytest.raises(ValueError, match="'m' is no number"):
        trackers.log({"m": value}, 1)
    trackers.finish()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_without_its_package_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"trainer.logger: '{name}' .* pip install {name}"):
        _open(tmp_path / "run", [name])
    assert not (tmp_path / "run").exists()
