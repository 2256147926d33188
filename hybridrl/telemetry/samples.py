"""The same held-out problems before and after training, from a run's validation/step_N.parquet files."""

import re
from collections import Counter
from math import sqrt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SHOWN = 12
MAX_CHARACTERS = 2000
# (key, heading): every problem answered at both validations falls into one.
OUTCOMES = (
    ("gained", "newly solved"),
    ("kept", "solved before and after"),
    ("lost", "solved before only"),
    ("missed", "never solved"),
)


def compare_samples(folder: Path) -> dict | None:
    """First against last validation, or None if there is none.

    Returns first_step, last_step (equal if there is one file; then `rows` have no "before"), total, outcomes (key,
    heading, count), and about 12 rows (outcome, prompt, truth, before, after with text, right, score): of each outcome
    in proportion to the square root of its count, so that a rare one is seen too. A response is right if acc > 0.5 or,
    without acc, score > 0.
    """
    files = sorted(
        (int(m[1]), path) for path in folder.glob("step_*.parquet") if (m := re.search(r"step_(\d+)$", path.stem))
    )
    if not files:
        return None
    (first_step, first_path), (last_step, last_path) = files[0], files[-1]
    last = _by_prompt(pq.read_table(last_path))
    first = _by_prompt(pq.read_table(first_path)) if first_step != last_step else {}
    groups: dict[str, list[dict]] = {key: [] for key, _ in OUTCOMES}
    for key, after in last.items():
        before = first.get(key)
        if before is None and first:
            continue
        was_right = before["right"] if before else after["right"]
        outcome = {(0, 1): "gained", (1, 1): "kept", (1, 0): "lost", (0, 0): "missed"}[was_right, after["right"]]
        groups[outcome].append(
            {
                "outcome": outcome,
                "prompt": _cut(after["prompt"]),
                "truth": after["truth"],
                "before": before,
                "after": after,
            }
        )
    total = sum(map(len, groups.values()))
    outcomes = [{"key": key, "heading": heading, "count": len(groups[key])} for key, heading in OUTCOMES]
    whole = sum(sqrt(len(rows)) for rows in groups.values())
    rows = [row for key, _ in OUTCOMES for row in _spread_out(groups[key], whole)]
    return {"first_step": first_step, "last_step": last_step, "total": total, "outcomes": outcomes, "rows": rows}


def _by_prompt(table: pa.Table) -> dict[tuple[str, int], dict]:
    """Rows by prompt and, for prompts that occur more than once, by occurrence."""
    seen: Counter[str] = Counter()
    found = {}
    for row in table.to_pylist():
        acc, score = row.get("acc"), row.get("score")
        right = acc > 0.5 if acc is not None and acc == acc else score is not None and score > 0
        key = (row["prompt"], seen[row["prompt"]])
        seen[row["prompt"]] += 1
        truth = row.get("ground_truth")
        found[key] = {"prompt": row["prompt"], "truth": _cut("" if truth is None else str(truth)),
                      "text": _cut(row["response"]), "right": int(right), "score": score}  # fmt: skip
    return found


def _spread_out(rows: list[dict], whole: float) -> list[dict]:
    """This outcome's share of the rows shown, evenly spaced so that the choice is nobody's pick."""
    count = min(len(rows), max(1, round(SHOWN * sqrt(len(rows)) / whole))) if rows else 0
    return [rows[i * len(rows) // count] for i in range(count)]


def _cut(text: str) -> str:
    text = text.strip("\n")
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text) - MAX_CHARACTERS} more characters)"
