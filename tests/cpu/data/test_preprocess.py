"""Data preparation: the schema of the files, answers found, faults told, nothing half written."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridrl.data.boxed import last_boxed
from hybridrl.data.preprocess import gsm8k, math
from hybridrl.data.preprocess import rows as shared
from hybridrl.data.prompts import PromptDataset

GSM = [{"question": "Two and two?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
       {"question": "A thousand?", "answer": "#### 1,000"}]
MATH = [{"problem": "Half?", "solution": r"So $\boxed{\frac{1}{2}}$.", "level": "Level 1"}]


def run(module, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
    shared.run(module.main)


def jsonl(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items), encoding="utf-8")
    return folder


@pytest.mark.parametrize("option", ["--local_dir", "--local_save_dir"])
def test_gsm8k_schema(tmp_path, monkeypatch, tokenizer, option):
    source = jsonl(tmp_path / "raw", train=GSM, test=GSM[:1])
    run(gsm8k, monkeypatch, option, tmp_path / "out", "--source", source)
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert table.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    first, second = table.to_pylist()
    assert first["data_source"] == "openai/gsm8k" and first["ability"] == "math"
    assert first["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert first["extra_info"] == {"split": "train", "index": 0, "answer": GSM[0]["answer"], "question": "Two and two?"}
    [message] = first["prompt"]
    assert message["role"] == "user" and message["content"].startswith("Two and two? ") and "####" in message["content"]
    assert second["reward_model"]["ground_truth"] == "1000"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    assert len(PromptDataset([str(tmp_path / "out" / "test.parquet")], tokenizer, 512)) == 1


def test_math_from_jsonl_and_parquet(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "raw", train=MATH)
    pq.write_table(pa.Table.from_pylist(MATH * 2), source / "test.parquet")
    run(math, monkeypatch, "--local_dir", tmp_path / "out", "--source", source)
    rows = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert len(rows) == 2 and rows[1]["extra_info"]["index"] == 1
    assert rows[0]["data_source"] == "DigitalLearningGmbH/MATH-lighteval"
    assert rows[0]["reward_model"]["ground_truth"] == r"\frac{1}{2}"


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{4}", "4"), (r"\boxed{1} then \boxed{\frac{a}{b}} end", r"\frac{a}{b}"), (r"$\fbox{3}$", "3"),
    (r"$\boxed 7$.", "7"), (r"\boxed{{}}", "{}"), ("none", None), (r"\boxed{open", None), (r"\boxedtext{4}", None),
    (r"\boxed", None),
])
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


def test_faults_name_the_mend_and_write_nothing(tmp_path, monkeypatch):
    def expect(match, source, module=gsm8k):
        with pytest.raises(SystemExit, match=match):
            run(module, monkeypatch, "--local_dir", tmp_path / "out", "--source", source)
        assert not (tmp_path / "out").exists()

    expect("error: --source .*none is no folder", tmp_path / "none")
    expect("lacks the split 'test'.*test.jsonl.*found: train.jsonl", jsonl(tmp_path / "1", train=GSM))
    expect("train is empty", jsonl(tmp_path / "2", train=[], test=GSM))
    expect("row 1 has no text in field 'answer'", jsonl(tmp_path / "3", train=[GSM[0], {"question": "?"}], test=GSM))
    expect("test row 0: the answer has no final", jsonl(tmp_path / "4", train=GSM, test=[
        {"question": "?", "answer": "4"}]))
    expect("no \\\\boxed", jsonl(tmp_path / "5", train=[{"problem": "?", "solution": "4"}], test=MATH), math)
    broken = jsonl(tmp_path / "6", train=GSM, test=GSM)
    (broken / "train.jsonl").write_text('{"question": "a", \n')
    expect("train.jsonl line 1 is not JSON", broken)
    short = jsonl(tmp_path / "7", test=GSM)
    (short / "train.parquet").write_bytes(b"PAR1")
    expect("train.parquet cannot be read", short)


def test_unreachable_hub_names_source(tmp_path, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SystemExit, match="could not load openai/gsm8k .*no route.*--source"):
        run(gsm8k, monkeypatch, "--local_dir", tmp_path / "out")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    shared.write_rows([gsm8k.make_row(GSM[0], "train", 0)], path)
    before = path.read_bytes()

    def full(table, target):
        target.write_bytes(b"PAR1")
        raise OSError("No space left on device")

    monkeypatch.setattr("hybridrl.data.files.pq.write_table", full)
    with pytest.raises(OSError, match="No space"):
        shared.write_rows([gsm8k.make_row(GSM[1], "train", 0)], path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["train.parquet"]
