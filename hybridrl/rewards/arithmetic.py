"""The quickstart's rule: the response's last "####" is followed by exactly the ground truth, and by nothing else."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> dict:
    """1 when what follows the last "####" is `ground_truth`, else 0."""
    _, mark, answer = solution_str.rpartition("####")
    score = float(bool(mark) and answer.strip() == ground_truth)
    return {"score": score, "acc": score}
