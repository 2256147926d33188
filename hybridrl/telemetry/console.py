"""What people see in the terminal: a progress bar, a table row a step, tables, sample generations.

On a terminal rich draws in colour and the columns that do not fit are dropped, least telling first. Anywhere else (a
log file, CI) the same numbers come as plain aligned lines, with the time left in a column instead of a bar.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TextIO

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

HEADER_EVERY = 20
SAMPLE_WIDTH = 100
# Trainer time of a step: everything that reads or updates the models, but for the generation.
TRAIN_PHASES = ("old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")
BLANK = "·"


def compact(value: float) -> str:
    """At most seven characters, three or four of them telling: 0.0031, 12.4, 15.2k, 3.1e-05."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if size < 0.001:
        return f"{value:.1e}"
    if size < 1:
        return f"{value:.4f}"
    if size < 10:
        return f"{value:.3f}"
    if size < 1000:
        return f"{value:.1f}"
    return f"{value / 1e3:.1f}k" if size < 1e6 else f"{value / 1e6:.2f}M"


def duration(seconds: float) -> str:
    """45s, 3m05s, 2h07m."""
    whole = max(int(round(seconds)), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _first(*names: str) -> Callable[[dict[str, float]], float | None]:
    return lambda metrics: next((metrics[name] for name in names if name in metrics), None)


def _accuracy(metrics: dict[str, float]) -> float | None:
    """Mean over the data sources of val-core/{source}/{acc|reward}/mean@n."""
    values = [metrics[name] for name in metrics if name.startswith("val-core/") and "/mean@" in name]
    return fmean(values) if values else None


def _train_seconds(metrics: dict[str, float]) -> float | None:
    found = [metrics[f"timing_s/{name}"] for name in TRAIN_PHASES if f"timing_s/{name}" in metrics]
    return sum(found) if found else None


@dataclass(frozen=True)
class Column:
    """`rank`: the higher, the sooner dropped from a narrow terminal. An optional column waits for its first value."""

    title: str
    value: Callable[[dict[str, float]], float | None]
    width: int
    rank: int
    optional: bool = False
    format: Callable[[float], str] = compact


COLUMNS = (
    Column("score", _first("critic/score/mean"), 7, 0, format=lambda v: f"{v:.3f}"),
    Column("val_acc", _accuracy, 7, 1, optional=True, format=lambda v: f"{v:.3f}"),
    Column("resp_len", _first("response_length/mean"), 8, 4, format=lambda v: f"{v:.1f}"),
    Column("ppo_kl", _first("actor/ppo_kl"), 8, 2),
    Column("ref_kl", _first("actor/reward_kl_penalty", "actor/kl_loss"), 7, 10, optional=True),
    Column("entropy", _first("actor/entropy", "actor/entropy_loss"), 7, 5),
    Column("clipfrac", _first("actor/pg_clipfrac"), 8, 7),
    Column("vf_loss", _first("critic/vf_loss"), 7, 9, optional=True),
    Column("vf_expl", _first("critic/vf_explained_var"), 7, 6, optional=True, format=lambda v: f"{v:.3f}"),
    Column("grad_norm", _first("actor/grad_norm"), 9, 8),
    Column("gen_s", _first("timing_s/gen"), 6, 11, format=lambda v: f"{v:.1f}"),
    Column("train_s", _train_seconds, 7, 12, format=lambda v: f"{v:.1f}"),
    Column("tok/s", _first("perf/throughput"), 6, 3),
)

SUPERVISED_COLUMNS = (
    Column("loss", _first("train/loss"), 7, 0),
    Column("val_loss", _first("val/loss"), 8, 1, optional=True),
    Column("entropy", _first("train/entropy"), 7, 4),
    Column("grad_norm", _first("train/grad_norm"), 9, 3),
    Column("lr", _first("train/lr"), 8, 2),
    Column("step_s", _first("timing_s/step"), 6, 5, format=lambda v: f"{v:.2f}"),
)


class _TimeLeft(TextColumn):
    """Time left from the recent steps, counting down inside a step: one step may take minutes."""

    def __init__(self, estimate: Callable[[], float | None]):
        super().__init__("")
        self._estimate = estimate

    def render(self, task: Task) -> Text:
        left = self._estimate()
        return Text("estimating" if left is None else f"{duration(left)} left", style="cyan")


class StepConsole:
    """Rows, progress bar, tables and samples on one stream (stdout unless `file` is given)."""

    def __init__(self, total_steps: int | None = None, file: TextIO | None = None):
        self.console = Console(file=file or sys.stdout, highlight=False, soft_wrap=False)
        self.interactive = self.console.is_terminal
        self.total_steps = total_steps
        self._file = file or sys.stdout
        self._columns = COLUMNS
        self._seen: set[str] = set()
        self._shown: tuple[Column, ...] = ()
        self._rows_since_header = 0
        self._durations: deque[float] = deque(maxlen=20)
        self._last_log = time.monotonic()
        self._step = 0
        self._progress: Progress | None = None

    def start(self, completed: int = 0) -> None:
        """Show the progress bar (terminals only), `completed` steps being done already."""
        self._step, self._last_log = completed, time.monotonic()
        if not self.interactive or self.total_steps is None or self._progress is not None:
            return
        self._progress = Progress(
            SpinnerColumn(style="cyan"),
            TextColumn("[bold]step {task.completed:.0f}/{task.total:.0f}[/]"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TimeElapsedColumn(),
            _TimeLeft(self.seconds_left),
            TextColumn("[dim]{task.fields[phase]:<16}[/]"),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("steps", total=self.total_steps, completed=completed, phase="")
        self._progress.start()

    def phase(self, name: str) -> None:
        """Show what the step is doing now."""
        if self._progress is not None:
            self._progress.update(self._task, phase=name)

    def seconds_left(self) -> float | None:
        """Estimate from the mean of up to 20 recent steps; None before the first or without a total."""
        if not self._durations or self.total_steps is None:
            return None
        in_step = min(time.monotonic() - self._last_log, self._durations[-1])
        return max((self.total_steps - self._step) * fmean(self._durations) - in_step, 0.0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One row for a training step; one line for metrics of a validation alone."""
        now = time.monotonic()
        training = any(name.startswith(("actor/", "critic/", "timing_s/gen", "train/")) for name in metrics)
        if "train/loss" in metrics:
            self._columns = SUPERVISED_COLUMNS
        if training:
            self._durations.append(metrics.get("timing_s/step", now - self._last_log))
        self._last_log, self._step = now, step
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        self._seen |= {column.title for column in self._columns if column.value(metrics) is not None}
        if not training:
            self._validation_line(metrics, step)
            return
        shown = self._choose_columns()
        if shown != self._shown or self._rows_since_header >= HEADER_EVERY:
            self._shown, self._rows_since_header = shown, 0
            titles = [("step", self._step_width()), *((column.title, column.width) for column in shown)]
            self._emit([(title, width, "bold") for title, width in titles], header=True)
        self._rows_since_header += 1
        self._emit(self._cells(metrics, step))

    def _step_width(self) -> int:
        return max(2 * len(str(self.total_steps)) + 1 if self.total_steps else 6, 6)

    def _choose_columns(self) -> tuple[Column, ...]:
        shown = [column for column in self._columns if not column.optional or column.title in self._seen]
        if self.interactive:
            room = self.console.width - self._step_width()
            while shown and sum(column.width + 2 for column in shown) > room:
                shown.remove(max(shown, key=lambda column: column.rank))
        return tuple(shown)

    def _cells(self, metrics: dict[str, float], step: int) -> list[tuple[str, int, str]]:
        label = f"{step}/{self.total_steps}" if self.total_steps else str(step)
        cells = [(label, self._step_width(), "cyan")]
        for column in self._shown:
            value = column.value(metrics)
            if value is None:
                cells.append((BLANK, column.width, "dim"))
            elif not math.isfinite(value):
                cells.append((str(value), column.width, "bold red"))
            else:
                style = "bold green" if column.title == "val_acc" else "bold" if column.title == "score" else ""
                cells.append((column.format(value), column.width, style))
        return cells

    def _emit(self, cells: list[tuple[str, int, str]], header: bool = False) -> None:
        if self.interactive:
            line = Text("  ").join(Text(text.rjust(width), style=style) for text, width, style in cells)
            if header:
                self.console.print(Text("─" * min(len(line), self.console.width), style="dim"))
            self.console.print(line, no_wrap=True, overflow="crop", crop=True)
            return
        line = "  ".join(text.rjust(width) for text, width, _ in cells)
        left = self.seconds_left()
        if self.total_steps is not None:
            line += "  " + ("left" if header else duration(left) if left is not None else BLANK).rjust(7)
        print(line, file=self._file, flush=True)

    def _validation_line(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            if not name.startswith("val-core/"):
                continue
            label = f"step {step}  validation  {name.removeprefix('val-core/')}  "
            if self.interactive:
                self.console.print(Text.assemble(label, (f"{value:.3f}", "bold green")))
            else:
                print(f"{label}{value:.3f}", file=self._file, flush=True)

    def sample(
        self, title: str, prompt: str, response: str, ground_truth: str | None = None, score: float | None = None
    ) -> None:
        """One generation. The texts are shown as they are: markup and escape codes in them do nothing."""
        prompt, response = (_printable(text.strip("\n")) for text in (prompt, response))
        verdict = "" if score is None else f"score {score:.3g}"
        truth = "" if ground_truth is None else f"expected {_printable(ground_truth)}"
        footer = "   ".join(part for part in (truth, verdict) if part)
        if not self.interactive:
            print(f"{title}\n  prompt:   {_indent(prompt)}\n  response: {_indent(response)}", file=self._file)
            print(f"  {footer}" if footer else "", file=self._file, flush=True)
            return
        good = score is not None and score > 0
        body = Text.assemble((prompt, "dim"), "\n", response)
        style = "green" if good else "yellow" if score is not None else "cyan"
        panel = Panel(body, title=Text(title), subtitle=Text(footer), border_style=style)
        panel.title_align, panel.subtitle_align = "left", "right"
        panel.width = min(self.console.width, SAMPLE_WIDTH)
        self.console.print(panel)

    def table(self, title: str, rows: Sequence[Sequence[object]], columns: Sequence[str] | None = None) -> None:
        """See `print_table`."""
        cells = [[_printable(str(cell)) for cell in row] for row in rows]
        if not self.interactive:
            self._plain_table(title, cells, columns)
            return
        table = Table(title=Text(title, style="bold"), title_justify="left", border_style="dim", header_style="bold")
        table.show_header = columns is not None
        for index, numeric in enumerate(_numeric_columns(cells)):
            style = "cyan" if index == 0 else ""
            heading = columns[index] if columns else ""
            table.add_column(heading, justify="right" if numeric else "left", style=style)
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    def _plain_table(self, title: str, cells: list[list[str]], columns: Sequence[str] | None) -> None:
        lines = ([list(columns)] if columns else []) + cells
        numeric = _numeric_columns(cells)
        widths = [max(len(row[i]) for row in lines if i < len(row)) for i in range(len(numeric))]
        print(title, file=self._file)
        for row in lines:
            padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=False)]
            print("  " + "  ".join(padded).rstrip(), file=self._file)
        self._file.flush()

    def close(self) -> None:
        """Take the progress bar down; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _printable(text: str) -> str:
    """The text without control characters (a model may well write a terminal's escape codes)."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def _indent(text: str) -> str:
    return text.replace("\n", "\n            ")


def _numeric_columns(cells: list[list[str]]) -> list[bool]:
    """Per column: does every cell begin and look like a number (so that it is set flush right)?"""
    width = max(map(len, cells), default=0)
    columns = [[row[i] for row in cells if i < len(row) and row[i]] for i in range(width)]
    return [bool(column) and all(_is_number(cell) for cell in column) for column in columns]


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").replace("_", "").rstrip("%"))
    except ValueError:
        return False
    return True


def print_table(title: str, rows: Sequence[Sequence[object]], columns: Sequence[str] | None = None) -> None:
    """A titled table on stdout, such as the batch plan; columns of numbers are set flush right."""
    StepConsole().table(title, rows, columns)
