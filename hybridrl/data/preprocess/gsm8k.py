"""GSM8K as train.parquet and test.parquet.

    python -m hybridrl.data.preprocess.gsm8k --local_dir data/gsm8k [--source FOLDER]

FOLDER holds train.jsonl and test.jsonl (question, answer) as published with the data set; without it they come from
the Hugging Face hub.
"""

from hybridrl.data.preprocess.rows import arguments, convert, raw_rows, row, run

DATA_SOURCE = "openai/gsm8k"
INSTRUCTION = 'Reason step by step, then give the final answer as a number after "####".'


def make_row(item: dict, split: str, index: int) -> dict:
    """One row from a raw {question, answer}; the ground truth is the number after the last "####", without commas."""
    question, answer = item["question"], item["answer"]
    _, mark, truth = answer.rpartition("####")
    truth = truth.strip().replace(",", "")
    if not mark or not truth:
        raise ValueError(f"{split} row {index}: the answer has no final '#### number': {answer[-60:]!r}")
    return row(DATA_SOURCE, f"{question} {INSTRUCTION}", truth, ability="math", split=split, index=index,
               question=question, answer=answer)


def main() -> None:
    args = arguments(__doc__, "data/gsm8k")
    convert(args, lambda split: raw_rows(args.source, split, (DATA_SOURCE, "main"), ("question", "answer")), make_row)


if __name__ == "__main__":
    run(main)
