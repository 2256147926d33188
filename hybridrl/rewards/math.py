"""Competition mathematics: the answer must be mathematically equal to the ground truth (math-verify)."""

import logging

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.parser import ExprExtractionConfig

from hybridrl.data.boxed import last_boxed

logging.getLogger("math_verify").setLevel(logging.ERROR)  # or it warns of the missing timeouts at each call

MAX_CHARACTERS = 4096  # the end of the solution that is searched; parsing time grows with the length


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> dict:
    r"""1 when the solution's answer (the last \boxed{}, else its last formula or number) equals the truth, else 0.

    The library's own timeouts need SIGALRM, so a main thread; they are off, and the caller's process pool has its own.
    """
    tail = solution_str[-MAX_CHARACTERS:]
    boxed = last_boxed(tail)
    # With several boxes the library would weigh them all; a solution's answer is its last.
    text, kinds = (tail, [LatexExtractionConfig(), ExprExtractionConfig()]) if boxed is None else (
        rf"\boxed{{{boxed}}}", [LatexExtractionConfig()])
    gold = parse(rf"\boxed{{{ground_truth}}}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    answer = parse(text, extraction_config=kinds, parsing_timeout=None)
    score = float(bool(gold) and bool(answer) and verify(gold, answer, timeout_seconds=None))
    return {"score": score, "acc": score}
