"""Additions for the quickstart: data for a supervised warm start, for reinforcement learning, and held out.

    python -m hybridrl.data.preprocess.arithmetic --local_dir data/arithmetic

Writes sft_train.parquet (prompt and response columns), train.parquet and test.parquet (verl's schema). Which of the
three an addition belongs to is decided by a hash of it, the same for a+b and b+a, so none is in two files.

A response adds column by column from the right, then gives the sum: "8+6=14, 4+7+1=12, 3+2+1=6 #### 626".
The demonstrations of the warm start come from a deliberately careless teacher, who forgets to carry with probability
`--forget` at each carry. A model that imitates it knows the careful and the careless way and prefers the careless one;
only the reward says which is right. So the quickstart shows reinforcement learning choose among behaviours that the
model already has, which a small model can do in minutes; it does not show one learn arithmetic from nothing.
"""

import argparse
import hashlib
import random
from pathlib import Path

from hybridrl.data.preprocess.rows import row, run, write_rows

DATA_SOURCE = "arithmetic"
# Shares of the hash space, in percent.
SPLITS = {"test": range(0, 10), "sft": range(10, 50), "train": range(50, 100)}


def split_of(a: int, b: int) -> str:
    """The file an addition belongs to: "sft", "train" or "test", for ever the same."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def question(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def solve(a: int, b: int, forget: float = 0.0, rng: random.Random | None = None) -> str:
    """Column addition as text, ending in "#### sum". Each carry is forgotten with probability `forget`."""
    steps, result, carry, place = [], 0, 0, 1
    while place <= max(a, b):
        x, y = a // place % 10, b // place % 10
        steps.append(f"{x}+{y}{'+1' if carry else ''}={x + y + carry}")
        total, last = x + y + carry, place * 10 > max(a, b)
        result += (total if last else total % 10) * place
        carry = int(total >= 10 and not (forget and rng.random() < forget))
        place *= 10
    return f"{', '.join(steps)} #### {result}"


def draw(split: str, count: int, digits: int, rng: random.Random) -> list[tuple[int, int]]:
    """`count` different additions of `split`, both numbers of `digits` digits. ValueError if there are not so many."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    # Ordered pairs; half of the split's expected number keeps rejection quick.
    room = (high - low + 1) ** 2 * len(SPLITS[split]) // 200
    if count > room:
        raise ValueError(f"{count} additions of {digits} digits are too many for the {split} split (at most {room}): "
                         "lower the size or raise --digits")
    chosen: dict[tuple[int, int], None] = {}
    while len(chosen) < count:
        pair = rng.randint(low, high), rng.randint(low, high)
        if split_of(*pair) == split:
            chosen[pair] = None
    return list(chosen)


def make(split: str, count: int, digits: int, seed: int) -> list[dict]:
    """Rows of verl's schema for `split`."""
    rows = []
    for index, (a, b) in enumerate(draw(split, count, digits, random.Random(f"{seed} {split}"))):
        rows.append(row(DATA_SOURCE, question(a, b), str(a + b), ability="math", split=split, index=index,
                        question=question(a, b), answer=solve(a, b)))
    return rows


def make_demonstrations(count: int, digits: int, forget: float, seed: int) -> list[dict]:
    """Rows of the warm start: prompt (messages), response (the careless teacher's), extra_info."""
    teacher = random.Random(f"{seed} teacher")
    rows = []
    for item in make("sft", count, digits, seed):
        a, b = (int(word.strip("?")) for word in item["extra_info"]["question"].split()[2::2])
        rows.append({"prompt": item["prompt"], "response": solve(a, b, forget, teacher),
                     "extra_info": item["extra_info"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local_dir", "--local_save_dir", type=Path, default=Path("data/arithmetic"))
    parser.add_argument("--digits", type=int, default=3, help="digits of each number")
    parser.add_argument("--sft_size", type=int, default=32000)
    parser.add_argument("--train_size", type=int, default=8192)
    parser.add_argument("--test_size", type=int, default=512)
    parser.add_argument("--forget", type=float, default=0.7, help="chance that the teacher forgets a carry")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.digits < 1 or not 0 <= args.forget <= 1 or min(args.sft_size, args.train_size, args.test_size) < 1:
        raise ValueError("--digits and the sizes must be at least 1, --forget between 0 and 1")
    files = {"sft_train": make_demonstrations(args.sft_size, args.digits, args.forget, args.seed),
             "train": make("train", args.train_size, args.digits, args.seed),
             "test": make("test", args.test_size, args.digits, args.seed)}
    for name, rows in files.items():
        write_rows(rows, args.local_dir.expanduser() / f"{name}.parquet")


if __name__ == "__main__":
    run(main)
