"""GSM8K's rule: the number after the last "####" must be the ground truth, written the same way."""

import re

TAIL = 300  # only so many last characters are searched, as in verl: an answer is short and at the end

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9.,]+")


def extract(solution: str, method: str = "strict") -> str | None:
    """The answer of a solution without commas and dollar signs, or None.

    "strict": the number after the last "#### ". "flexible": the last number anywhere that is more than punctuation.
    """
    tail = solution[-TAIL:]
    found = (_STRICT if method == "strict" else _NUMBER).findall(tail)
    if method == "strict":
        return found[-1].replace(",", "").replace("$", "") if found else None
    return next((x for x in reversed(found) if x not in (".", ",", "-")), None)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> dict:
    """1 when the strict answer equals `ground_truth`, else 0."""
    score = float(extract(solution_str) == ground_truth)
    return {"score": score, "acc": score}


def compute_score_flexible(data_source: str, solution_str: str, ground_truth: str,
                           extra_info: dict | None = None) -> dict:
    """As `compute_score`, but the last number anywhere counts; for use by custom_reward_function.path and name."""
    score = float(extract(solution_str, "flexible") == ground_truth)
    return {"score": score, "acc": score}
