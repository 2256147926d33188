"""Rows, header and tables as plain lines, and the columns a terminal gets."""

import io

import pytest
from rich.console import Console

from hybridrl.telemetry.console import HEADER_EVERY, StepConsole, compact, duration, print_table

STEP = {
    "critic/score/mean": 0.25,
    "response_length/mean": 21.26,
    "actor/ppo_kl": 0.00213,
    "actor/entropy": 0.5,
    "actor/pg_clipfrac": 0.06,
    "actor/grad_norm": float("nan"),
    "timing_s/gen": 3.04,
    "timing_s/ref": 0.5,
    "timing_s/update_actor": 2.0,
    "timing_s/step": 6.0,
    "perf/throughput": 1234.5,
}


def _rows(console, stream):
    return [line.split() for line in stream.getvalue().splitlines()]


def test_a_row_under_its_header():
    stream = io.StringIO()
    console = StepConsole(total_steps=10, file=stream)
    console.start()
    console.log(STEP, 1)
    header, row = _rows(console, stream)
    got = dict(zip(header, row, strict=True))
    assert got["step"] == "1/10" and got["score"] == "0.250" and got["resp_len"] == "21.3"
    assert got["ppo_kl"] == "0.0021" and got["grad_norm"] == "nan" and got["tok/s"] == "1.2k"
    assert got["gen_s"] == "3.0" and got["train_s"] == "2.5"
    assert got["left"] in ("54s", "53s")
    assert "vf_loss" not in got and "val_acc" not in got
    lines = stream.getvalue().splitlines()
    assert len(lines[0]) == len(lines[1])


def test_columns_join_when_their_metric_does_and_the_header_comes_again():
    stream = io.StringIO()
    console = StepConsole(file=stream)
    console.log(STEP, 1)
    console.log(STEP | {"val-core/openai/gsm8k/acc/mean@1": 0.5, "val-core/math/acc/mean@1": 0.25}, 2)
    console.log(STEP, 3)
    header, _, second_header, second, third = _rows(console, stream)
    assert "val_acc" not in header
    assert second[second_header.index("val_acc")] == "0.375"
    assert third[second_header.index("val_acc")] == "·"


def test_header_repeats():
    stream = io.StringIO()
    console = StepConsole(file=stream)
    for step in range(1, 2 * HEADER_EVERY + 2):
        console.log(STEP, step)
    assert sum(row[0] == "step" for row in _rows(console, stream)) == 3


def test_validation_alone_is_a_line():
    stream = io.StringIO()
    StepConsole(file=stream).log({"val-core/openai/gsm8k/acc/mean@1": 0.125, "val-aux/x/reward/mean@1": 1}, 0)
    assert stream.getvalue().split() == ["step", "0", "validation", "openai/gsm8k/acc/mean@1", "0.125"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_row_never_wraps_and_keeps_the_score(width):
    stream = io.StringIO()
    console = StepConsole(total_steps=500, file=stream)
    console.console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    console.interactive = True
    console.log(STEP | {"critic/vf_loss": 0.1, "critic/vf_explained_var": 0.5}, 1)
    _, header, row = stream.getvalue().splitlines()
    assert max(len(header), len(row)) <= width
    assert "score" in header and "0.250" in row
    assert ("train_s" in header) == (width == 200)


def test_progress_bar_on_a_terminal_counts_steps():
    stream = io.StringIO()
    console = StepConsole(total_steps=10, file=stream)
    console.console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    console.interactive = True
    console.start(completed=4)
    console.phase("update_actor")
    console.log(STEP, 5)
    console.close()
    console.close()
    shown = stream.getvalue()
    assert "step 5/10" in shown and "30s left" in shown and "update_actor" in shown


def test_plain_table_aligns_numbers_right(capsys):
    rows = [["prompts", 64], ["micro-batch tokens", 16384]]
    print_table("Batch plan", rows, ["quantity", "value"])
    assert capsys.readouterr().out.splitlines() == [
        "Batch plan",
        "  quantity            value",
        "  prompts                64",
        "  micro-batch tokens  16384",
    ]


def test_number_and_time_forms():
    numbers = [0.0, 1.2e-5, 0.0021, 0.5, 3.14159, 42.42, 999.0, 15234.0, 2.5e6, float("inf")]
    texts = ["0", "1.2e-05", "0.0021", "0.5000", "3.142", "42.4", "999.0", "15.2k", "2.50M", "inf"]
    assert [compact(number) for number in numbers] == texts
    assert [duration(s) for s in (0.4, 59.6, 185, 7620)] == ["0s", "1m00s", "3m05s", "2h07m"]
