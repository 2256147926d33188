"""The quickstart's additions: right and careless answers, splits disjoint by hash, the same from the same seed."""

import random
import re
import sys

import pyarrow.parquet as pq
import pytest

from hybridrl.data.preprocess import arithmetic
from hybridrl.data.preprocess.rows import run


def pairs(path):
    rows = pq.read_table(path).to_pylist()
    return [tuple(map(int, re.findall(r"\d+", row["prompt"][0]["content"]))) for row in rows], rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prog", "--local_dir", str(folder), "--sft_size", "3000", "--train_size", "2000"])
        run(arithmetic.main)
    return {name: pairs(folder / f"{name}.parquet") for name in ("sft_train", "train", "test")}


def test_splits_are_disjoint_also_with_the_numbers_swapped(made):
    seen = {name: {frozenset(p) for p in found} for name, (found, _) in made.items()}
    assert not seen["sft_train"] & seen["train"] and not seen["sft_train"] & seen["test"]
    assert not seen["train"] & seen["test"]
    assert {name: len(rows) for name, (_, rows) in made.items()} == {"sft_train": 3000, "train": 2000, "test": 512}
    for name, (found, _) in made.items():
        assert len(set(found)) == len(found)
        assert {arithmetic.split_of(b, a) for a, b in found} == {name.removesuffix("_train")}


def test_a_pair_stays_in_its_split_for_ever():
    # Values fixed here: a change of the hash would leak held-out problems into older runs' training data.
    drawn = ((348, 276), (276, 348), (999, 1), (512, 384), (200, 201), (201, 200))
    assert [arithmetic.split_of(a, b) for a, b in drawn] == ["sft", "sft", "train", "train", "test", "test"]


def test_rows_have_the_right_answers(made):
    for name in ("train", "test"):
        for (a, b), row in zip(*made[name], strict=True):
            assert row["reward_model"] == {"style": "rule", "ground_truth": str(a + b)}
            assert row["data_source"] == "arithmetic" and row["extra_info"]["split"] == name
            assert row["extra_info"]["answer"].endswith(f"#### {a + b}")


@pytest.mark.parametrize("a, b, text", [
    (348, 276, "8+6=14, 4+7+1=12, 3+2+1=6 #### 624"), (999, 1, "9+1=10, 9+0+1=10, 9+0+1=10 #### 1000"),
    (12, 34, "2+4=6, 1+3=4 #### 46"), (5, 5, "5+5=10 #### 10"),
])
def test_careful_solutions(a, b, text):
    assert arithmetic.solve(a, b) == text


def test_careless_solutions_differ_only_in_carries():
    rng = random.Random(0)
    assert arithmetic.solve(348, 276, 1.0, rng) == "8+6=14, 4+7=11, 3+2=5 #### 514"
    drawn = [(rng.randint(100, 999), rng.randint(100, 999)) for _ in range(500)]
    for a, b in drawn:
        text = arithmetic.solve(a, b, 0.5, rng)
        final = int(text.split("#### ")[1])
        digits = [int(s.split("=")[1]) for s in text.split(" ####")[0].split(", ")]
        assert final == digits[2] * 100 + digits[1] % 10 * 10 + digits[0] % 10
        for step in text.split(" ####")[0].split(", "):
            left, total = step.split("=")
            assert sum(map(int, left.split("+"))) == int(total), "each step by itself is right"
        assert int(arithmetic.solve(a, b).split("#### ")[1]) == a + b


def test_teacher_forgets_as_often_as_told(made):
    found, rows = made["sft_train"]
    carries = [(row["response"].split(", ")[1].count("+") == 2) for (a, b), row in zip(found, rows, strict=True)
               if a % 10 + b % 10 >= 10]
    assert abs(sum(carries) / len(carries) - 0.3) < 0.05
    assert set(rows[0]) == {"prompt", "response", "extra_info"}


def test_same_seed_same_rows_and_impossible_sizes():
    assert arithmetic.make("train", 50, 3, 1) == arithmetic.make("train", 50, 3, 1)
    assert arithmetic.make("train", 50, 3, 1) != arithmetic.make("train", 50, 3, 2)
    assert arithmetic.make_demonstrations(50, 3, 0.5, 1) == arithmetic.make_demonstrations(50, 3, 0.5, 1)
    with pytest.raises(ValueError, match="raise --digits"):
        arithmetic.make("test", 512, 2, 1)
