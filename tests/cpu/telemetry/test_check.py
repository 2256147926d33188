"""The gate passes, fails and refuses as it says."""

import json

import pytest

from hybridrl.telemetry.check import main

METRIC = "val-core/arithmetic/acc/mean@1"


@pytest.fixture
def gate(tmp_path, capsys):
    def run(values, *demands, metric=METRIC):
        lines = [json.dumps({"step": 5 * i, "metrics": {METRIC: value}}) + "\n" for i, value in enumerate(values)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        status = main([str(tmp_path), "--metric", metric, *demands])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_passes_and_shows_first_best_and_last(gate):
    status, text = gate([0.2, 0.9, 0.8], "--min-final", "0.7", "--min-ratio", "2.0")
    assert status == 0 and "PASSED" in text and "FAILED" not in text
    numbers = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "step" in line}
    expected = {"first": ["0.2000", "step", "0"], "best": ["0.9000", "step", "5"], "last": ["0.8000", "step", "10"]}
    assert numbers == expected


def test_the_last_value_counts_not_the_best(gate):
    status, text = gate([0.2, 0.9, 0.6], "--min-final", "0.7", "--min-ratio", "2.0")
    assert status == 1 and "ended at 0.6, below the 0.7 demanded" in text


def test_a_run_that_learns_nothing_fails(gate):
    status, text = gate([0.75, 0.75, 0.75], "--min-final", "0.7", "--min-ratio", "2.0")
    assert status == 1 and "x1.00, below x2" in text


@pytest.mark.parametrize("values, status", [([0.0, 0.0], 1), ([0.0, 0.1], 0)])
def test_from_zero(gate, values, status):
    assert gate(values, "--min-ratio", "2.0")[0] == status


@pytest.mark.parametrize("values", [[0.5], [0.2, None], [None, 0.9]])
def test_one_value_or_nan_is_no_rise(gate, values):
    assert gate(values, "--min-ratio", "1.5")[0] == 1


def test_missing_metric_names_those_there_are(gate):
    status, text = gate([0.2, 0.8], "--min-final", "0.7", metric="val-core/arithmetic/acc/mean@2")
    assert status == 2 and METRIC in text


def test_missing_folder_and_missing_demand(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--metric", METRIC, "--min-final", "1"]) == 2
    assert "trainer.default_local_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--metric", METRIC])
