"""One self-contained HTML page about a run: outcome, curves, time, memory, samples before and after, config.

    python -m hybridrl.telemetry.report RUN_DIR [--out report.html]

Reads metrics.jsonl, run.json, config.yaml and validation/*.parquet of the run folder. The page needs no network: charts
are drawn as SVG by a few hundred lines of script inside it. Parts whose metrics are missing are left out.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import median

from jinja2 import Environment, PackageLoader, StrictUndefined

from hybridrl.telemetry.console import compact, duration
from hybridrl.telemetry.history import History, load_history
from hybridrl.telemetry.samples import compare_samples
from hybridrl.telemetry.trackers import CONFIG_FILE, RUN_FILE

# A curve of more points is averaged over equal runs of steps: finer than a screen's pixels tells nothing.
MAX_POINTS = 1000
MAX_BARS = 120
VALIDATION = re.compile(r"val-core/(?P<source>.+)/(?P<variable>acc|reward)/mean@(?P<n>\d+)")

# (phase in timing_s/, label, colour class in the stylesheet). The colour's hue is the kind of work.
PHASES = (
    ("gen", "generate", "gen"),
    ("reward", "score", "gen2"),
    ("old_log_prob", "old log-probs", "inf1"),
    ("ref", "reference", "inf2"),
    ("values", "values", "inf3"),
    ("adv", "advantages", "inf4"),
    ("update_critic", "update critic", "upd2"),
    ("update_actor", "update actor", "upd1"),
    ("update_weights", "publish weights", "pub"),
    ("testing", "validate", "aux1"),
    ("save_checkpoint", "save", "aux2"),
)
# Line charts: section, title, what the axis says, [(metric, label, colour)], options for the script.
CHARTS = (
    ("learning", "Reward", "mean score of the step's samples", [("critic/score/mean", "score", "c1")], {}),
    (
        "learning",
        "Response length",
        "tokens",
        [("response_length/mean", "mean", "c1"), ("response_length/max", "longest", "c2")],
        {"zero": True},
    ),
    (
        "policy",
        "KL to the reference",
        "nats per token",
        [("actor/reward_kl_penalty", "in reward", "c1"), ("actor/kl_loss", "in loss", "c2")],
        {"zero": True},
    ),
    ("policy", "KL of the update", "nats per token, actor/ppo_kl", [("actor/ppo_kl", "ppo_kl", "c1")], {"zero": True}),
    ("policy", "Entropy", "nats per token", [("actor/entropy", "entropy", "c1")], {"zero": True}),
    (
        "policy",
        "Clipped tokens",
        "share of tokens",
        [("actor/pg_clipfrac", "clipped", "c1"), ("actor/pg_clipfrac_lower", "dual clip", "c2")],
        {"zero": True, "percent": True},
    ),
    (
        "policy",
        "Trainer against vLLM",
        "|difference| of log-probs of the same tokens, log scale",
        [("training/rollout_logprobs_diff_mean", "mean", "c1"), ("training/rollout_logprobs_diff_max", "max", "c2")],
        {"log": True},
    ),
    (
        "policy",
        "Gradient norm",
        "before clipping",
        [("actor/grad_norm", "actor", "c1"), ("critic/grad_norm", "critic", "c2")],
        {"zero": True},
    ),
    (
        "critic",
        "Value loss",
        "half squared error, critic/vf_loss",
        [("critic/vf_loss", "vf_loss", "c1")],
        {"zero": True},
    ),
    (
        "critic",
        "Explained variance",
        "of returns by values; 1 is perfect, 0 a constant",
        [("critic/vf_explained_var", "explained", "c1")],
        {"zero": True, "top": 1},
    ),
    ("system", "Throughput", "tokens per second and rank", [("perf/throughput", "tok/s", "c1")], {"zero": True}),
)
SECTIONS = (
    ("learning", "Learning"),
    ("policy", "Policy"),
    ("critic", "Critic"),
    ("system", "Time and memory"),
)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def bucketed(steps: list[int], values: list[float], limit: int) -> tuple[list[int], list[float | None]]:
    """At most `limit` points: means over equal runs of points, at the run's last step; not finite becomes None."""
    run = math.ceil(len(steps) / limit)
    points, means = [], []
    for start in range(0, len(steps), max(run, 1)):
        finite = [value for value in values[start : start + run] if math.isfinite(value)]
        points.append(steps[start : start + run][-1])
        means.append(sum(finite) / len(finite) if finite else None)
    return points, means


def _line(history: History, metric: str, label: str, colour: str) -> dict | None:
    steps, values = history.series(metric)
    if not any(math.isfinite(value) for value in values):
        return None
    x, y = bucketed(steps, values, MAX_POINTS)
    return {"label": label, "metric": metric, "colour": colour, "x": x, "y": y}


def line_charts(history: History) -> list[dict]:
    """The specs of all line charts that have data, held-out accuracy first."""
    charts = []
    validation = [name for name in history.names() if VALIDATION.fullmatch(name)]
    if validation:
        lines = []
        for index, name in enumerate(validation):
            match = VALIDATION.fullmatch(name)
            label = match["source"] if match["n"] == "1" else f"{match['source']} mean@{match['n']}"
            lines.append(_line(history, name, label, f"c{index % 6 + 1}"))
        lines = [line for line in lines if line is not None]
        percent = all("/acc/" in name for name in validation)
        options = {"zero": True, "dots": True, "percent": percent, "top": 1 if percent else None}
        unit = "share of held-out problems solved" if percent else "mean on held-out problems"
        charts.append({"section": "learning", "title": "Held-out accuracy" if percent else "Held-out score",
                       "unit": unit, "lines": lines, **options})  # fmt: skip
    for section, title, unit, metrics, options in CHARTS:
        lines = [line for line in (_line(history, *metric) for metric in metrics) if line is not None]
        if lines:
            charts.append({"section": section, "title": title, "unit": unit, "lines": lines, **options})
    memory = _memory_lines(history)
    if memory:
        charts.append({"section": "system", "title": "Memory", "unit": "GiB", "lines": memory, "zero": True})
    return charts


def _memory_lines(history: History) -> list[dict]:
    """The machine's and each process's memory; peaks are left to the table of all metrics, but on GPUs."""
    labels = {"cpu_memory_used_gb": "machine", "cpu_memory_rss_gb": "process", "max_memory_reserved_gb": "GPU reserved"}
    lines = []
    for name in history.names():
        owner, _, measure = name.rpartition("perf/")
        if measure in labels and (owner == "" or owner.endswith("/")):
            who = owner.rstrip("/") or ("driver" if measure == "cpu_memory_rss_gb" else "")
            label = who if measure == "cpu_memory_rss_gb" else f"{who} {labels[measure]}".strip()
            lines.append(_line(history, name, label, f"c{len(lines) % 6 + 1}"))
    return [line for line in lines if line is not None]


def phase_chart(history: History) -> dict | None:
    """Seconds of each phase per step, stacked; what timing_s/step holds beyond the phases is "other"."""
    steps = [step for step in history.steps if "timing_s/step" in history.by_step[step]]
    if not steps:
        return None
    known = {phase for phase, _, _ in PHASES}
    timed = [name.removeprefix("timing_s/") for name in history.names() if name.startswith("timing_s/")]
    extra = [
        (name, name.replace("_", " "), "aux3") for name in timed if name not in known | {"step"} and "/" not in name
    ]
    layers = []
    rest = [history.by_step[step]["timing_s/step"] for step in steps]
    for phase, label, colour in (*PHASES, *extra):
        seconds = [history.by_step[step].get(f"timing_s/{phase}", 0.0) for step in steps]
        seconds = [value if math.isfinite(value) else 0.0 for value in seconds]
        if any(seconds):
            rest = [whole - part for whole, part in zip(rest, seconds)]
            layers.append({"label": label, "colour": colour, "y": seconds})
    layers.append({"label": "other", "colour": "other", "y": [max(value, 0.0) for value in rest]})
    total = sum(sum(layer["y"]) for layer in layers) or 1.0
    for layer in layers:
        layer["share"] = sum(layer["y"]) / total
        x, layer["y"] = bucketed(steps, layer["y"], MAX_BARS)
    layers = [layer for layer in layers if layer["share"] >= 5e-4]
    return {"x": x, "layers": layers, "per_bar": math.ceil(len(steps) / MAX_BARS)}


def outcome(history: History) -> list[dict]:
    """One entry a validated data source: name, metric, first and last (step, value), best."""
    found = []
    for name in history.names():
        match = VALIDATION.fullmatch(name)
        if match is None:
            continue
        points = [point for point in zip(*history.series(name)) if math.isfinite(point[1])]
        if points:
            best = max(points, key=lambda point: point[1])
            kind = "accuracy" if match["variable"] == "acc" else "score"
            found.append({"source": match["source"], "kind": kind, "first": points[0], "last": points[-1],
                          "best": best, "n": int(match["n"]), "percent": kind == "accuracy"})  # fmt: skip
    return found


def cards(history: History) -> list[dict]:
    """Headline numbers: label, value, a line of detail."""
    found = []
    steps = [step for step in history.steps if any(n.startswith(("actor/", "critic/")) for n in history.by_step[step])]
    found.append(
        {"label": "Training steps", "value": str(len(steps)), "detail": f"up to step {steps[-1]}" if steps else ""}
    )
    seconds = [value for value in history.series("timing_s/step")[1] if math.isfinite(value)]
    if seconds:
        found.append({"label": "Time in steps", "value": duration(sum(seconds)),
                      "detail": f"median {median(seconds):.3g} s a step"})  # fmt: skip
    tokens = sum(value for value in history.series("perf/total_num_tokens")[1] if math.isfinite(value))
    if tokens and seconds:
        rank = [value for value in history.series("perf/throughput")[1] if math.isfinite(value)]
        detail = f"{compact(median(rank))} a rank (median)" if rank else "prompt and response tokens"
        found.append({"label": "Tokens per second", "value": compact(tokens / sum(seconds)), "detail": detail})
    peak = _peak_memory(history)
    if peak:
        found.append(peak)
    return found


def _peak_memory(history: History) -> dict | None:
    for suffix, detail in (
        ("perf/max_memory_reserved_gb", "GPU, reserved, highest rank"),
        ("perf/cpu_memory_used_gb", "whole machine"),
        ("perf/cpu_memory_rss_gb", "largest process"),
    ):
        values = [value for name in history.names() if name.endswith(suffix) for value in history.series(name)[1]]
        values = [value for value in values if math.isfinite(value)]
        if values:
            return {"label": "Peak memory", "value": f"{max(values):.1f} GiB", "detail": detail}
    return None


def metric_rows(history: History) -> list[dict]:
    """Every metric: how often, first, last, least, greatest, and the points of a small curve (SVG path, 120 x 24)."""
    rows = []
    for name in sorted(history.names()):
        steps, values = history.series(name)
        finite = [value for value in values if math.isfinite(value)]
        texts = [
            compact(v) for v in (values[0], values[-1], min(finite, default=math.nan), max(finite, default=math.nan))
        ]
        rows.append(
            {"name": name, "count": len(values), "numbers": texts, "path": _sparkline(*bucketed(steps, values, 120))}
        )
    return rows


def _sparkline(steps: list[int], values: list[float | None]) -> str:
    points = [(step, value) for step, value in zip(steps, values) if value is not None]
    if len(points) < 2:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    wide, tall = points[-1][0] - points[0][0] or 1, high - low
    pixels = [
        (2 + 116 * (step - points[0][0]) / wide, 21 - 18 * (value - low) / tall if tall else 12)
        for step, value in points
    ]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)


def _script_json(data: object) -> str:
    """JSON for inside a script element: no "<", so that no text can close the element."""
    return (
        json.dumps(data, allow_nan=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def build(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page (RUN_DIR/report.html by default) and return its path; ValueError if there are no metrics."""
    run_dir = Path(run_dir)
    history = load_history(run_dir)
    if not history.by_step:
        raise ValueError(f"{run_dir}: metrics.jsonl has no records yet, nothing to report")
    run_file, config_file = run_dir / RUN_FILE, run_dir / CONFIG_FILE
    run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.is_file() else {}
    charts = line_charts(history)
    phases = phase_chart(history)
    environment = Environment(loader=PackageLoader("hybridrl.telemetry"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        title=run.get("experiment") or run_dir.resolve().name,
        project=run.get("project", ""),
        hardware=run.get("hardware", ""),
        outcome=outcome(history),
        cards=cards(history),
        sections=SECTIONS,
        charts=charts,
        phases=phases,
        samples=compare_samples(run_dir / "validation"),
        metrics=metric_rows(history),
        config=config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
        data=_script_json({"charts": charts, "phases": phases}),
    )
    path = Path(out) if out is not None else run_dir / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybridrl.telemetry.report", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", help="the run's folder (trainer.default_local_dir)")
    parser.add_argument("--out", help="file to write; default RUN_DIR/report.html")
    arguments = parser.parse_args(argv)
    try:
        print(build(arguments.run_dir, arguments.out))
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
