"""Competition mathematics (MATH) as train.parquet and test.parquet.

    python -m hybridrl.data.preprocess.math --local_dir data/math [--source FOLDER]

FOLDER holds train and test as .jsonl or .parquet (problem, solution); without it they come from the Hugging Face hub.
"""

from hybridrl.data.boxed import last_boxed
from hybridrl.data.preprocess.rows import arguments, convert, raw_rows, row, run

DATA_SOURCE = "DigitalLearningGmbH/MATH-lighteval"
INSTRUCTION = r"Reason step by step, and put the final answer in \boxed{}."


def make_row(item: dict, split: str, index: int) -> dict:
    """One row from a raw {problem, solution}; the ground truth is the solution's last boxed answer."""
    truth = last_boxed(item["solution"])
    if truth is None:
        raise ValueError(f"{split} row {index}: the solution has no \\boxed{{}} answer: {item['solution'][-60:]!r}")
    return row(DATA_SOURCE, f"{item['problem']} {INSTRUCTION}", truth, ability="math", split=split, index=index,
               question=item["problem"], answer=item["solution"])


def main() -> None:
    args = arguments(__doc__, "data/math")
    convert(args, lambda split: raw_rows(args.source, split, (DATA_SOURCE,), ("problem", "solution")), make_row)


if __name__ == "__main__":
    run(main)
