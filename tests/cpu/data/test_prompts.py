"""Prompt data sets and their loader: faults, the four truncations, filtering, several files, exact resume."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridrl.data.prompts import SCHEMA, PromptDataset, PromptLoader, truncate


def write(path, texts, **changes):
    columns = {
        "data_source": ["arithmetic"] * len(texts),
        "prompt": [[{"role": "user", "content": t}] for t in texts],
        "ability": ["math"] * len(texts),
        "reward_model": [{"style": "rule", "ground_truth": str(i)} for i in range(len(texts))],
        "extra_info": [{"index": i, "split": "train"} for i in range(len(texts))],
    } | changes
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), path)
    return str(path)


def test_rows_are_rendered_tokenised_and_numbered_over_files(tmp_path, tokenizer):
    files = [write(tmp_path / "a.parquet", ["1+1", "2+2"]), write(tmp_path / "b.parquet", ["3+3"])]
    data = PromptDataset(files, tokenizer, 64)
    assert data.table.schema.equals(SCHEMA) and len(data) == 3
    row = data.table.to_pylist()[2]
    assert row["prompt_text"] == "<|im_start|>user\n3+3<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["prompt_ids"]) == row["prompt_text"]
    assert row["prompt_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert row["index"] == 2 and row["ground_truth"] == "0" and row["data_source"] == "arithmetic"
    assert json.loads(row["extra_info"]) == {"index": 0, "split": "train"}
    assert len(PromptDataset(files, tokenizer, 64, max_samples=1)) == 1
    assert PromptDataset(files, tokenizer, 64, apply_chat_template_kwargs={"shout": True}).table.column(
        "prompt_text")[0].as_py().endswith("!")


def test_other_columns_string_prompts_and_numeric_truths(tmp_path, bare_tokenizer):
    path = write(tmp_path / "a.parquet", ["x"], prompt=None, question=["hello"], data_source=None, kind=["mine"],
                 reward_model=[{"ground_truth": 7}], extra_info=None)
    data = PromptDataset([path], bare_tokenizer, 64, prompt_key="question", reward_fn_key="kind")
    row = data.table.to_pylist()[0]
    assert (row["prompt_text"], row["ground_truth"], row["data_source"], row["extra_info"]) == (
        "hello", "7", "mine", "{}")


def test_truncate_modes():
    ids = list(range(10))
    assert truncate(ids, 5, "left") == [5, 6, 7, 8, 9]
    assert truncate(ids, 5, "right") == [0, 1, 2, 3, 4]
    assert truncate(ids, 5, "middle") == [0, 1, 7, 8, 9]
    assert truncate(ids, 1, "middle") == [9] and truncate(ids, 10, "left") == ids


@pytest.mark.parametrize("mode", ["left", "right", "middle"])
def test_long_prompts_are_cut_as_asked(tmp_path, tokenizer, mode):
    path = write(tmp_path / "a.parquet", ["1" * 100, "2"])
    full = PromptDataset([path], tokenizer, 1000).table.column("prompt_ids").to_pylist()
    cut = PromptDataset([path], tokenizer, 40, truncation=mode).table.column("prompt_ids").to_pylist()
    assert cut == [truncate(full[0], 40, mode), full[1]] and len(cut[0]) == 40


def test_long_prompts_are_refused_or_dropped(tmp_path, tokenizer):
    path = write(tmp_path / "a.parquet", ["2", "1" * 100])
    with pytest.raises(ValueError, match="data.val_files.*1 of 2 prompts.*max_prompt_length=40.*row 1"):
        PromptDataset([path], tokenizer, 40, key_prefix="data.val_files")
    kept = PromptDataset([path], tokenizer, 40, filter_overlong_prompts=True)
    assert kept.table.column("index").to_pylist() == [0]
    with pytest.raises(ValueError, match="no prompt is left"):
        PromptDataset([path], tokenizer, 5, filter_overlong_prompts=True)


def test_faults_name_key_and_mend(tmp_path, tokenizer, bare_tokenizer):
    good = write(tmp_path / "good.parquet", ["1"])

    def expect(match, path, tok=tokenizer, **kwargs):
        with pytest.raises(ValueError, match=match):
            PromptDataset([path], tok, 64, **kwargs)

    expect("data.train_files: no such file", str(tmp_path / "no.parquet"))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((tmp_path / "good.parquet").read_bytes()[:300])
    expect("data.train_files.*truncated", str(broken))
    expect("no column 'question'.*data.prompt_key", good, prompt_key="question")
    expect("no column 'kind'.*data.reward_fn_key", good, reward_fn_key="kind")
    expect("no column 'reward_model'", write(tmp_path / "1.parquet", ["1"], reward_model=None))
    expect("'reward_model' is string", write(tmp_path / "2.parquet", ["1"], reward_model=["7"]))
    expect("row 0: reward_model.ground_truth", write(tmp_path / "3.parquet", ["1"], reward_model=[{"style": "rule"}]))
    expect("column 'prompt' is list", write(tmp_path / "4.parquet", ["1"], prompt=[[1, 2]]))
    expect("'data_source' is int64", write(tmp_path / "5.parquet", ["1"], data_source=[3]))
    expect("row 1: the prompt is empty", write(tmp_path / "6.parquet", ["1", "2"],
           prompt=[[{"role": "user", "content": "x"}], []]))
    expect("no prompt is left", write(tmp_path / "7.parquet", [], reward_model=pa.array([], pa.struct(
        {"ground_truth": pa.string()})), prompt=pa.array([], pa.string()), data_source=pa.array([], pa.string()),
        extra_info=None, ability=None))
    expect("no chat template", good, tok=bare_tokenizer)
    expect("data.truncation='up'", good, truncation="up")
    with pytest.raises(ValueError, match="data.train_files is empty"):
        PromptDataset([], tokenizer, 64)


def make_loader(tmp_path, tokenizer, n=10, batch=3, **kwargs):
    path = write(tmp_path / f"{n}.parquet", [str(i) for i in range(n)])
    return PromptLoader(PromptDataset([path], tokenizer, 64), batch, **kwargs)


def indices(loader, steps):
    return [(loader.next()) for _ in range(steps)]


def test_epochs_are_permutations_of_their_own(tmp_path, tokenizer):
    loader = make_loader(tmp_path, tokenizer, seed=1)
    assert loader.steps_per_epoch == 3
    drawn = [(table.column("index").to_pylist(), epoch) for table, epoch in indices(loader, 6)]
    assert [epoch for _, epoch in drawn] == [0, 0, 0, 1, 1, 1]
    first, second = sum((d for d, _ in drawn[:3]), []), sum((d for d, _ in drawn[3:]), [])
    assert len(set(first)) == len(set(second)) == 9 and first != second != sorted(second)
    same = make_loader(tmp_path, tokenizer, seed=1)
    assert [t.column("index").to_pylist() for t, _ in indices(same, 6)] == [d for d, _ in drawn]
    other = make_loader(tmp_path, tokenizer, seed=2)
    assert [t.column("index").to_pylist() for t, _ in indices(other, 3)] != [d for d, _ in drawn[:3]]
    plain = make_loader(tmp_path, tokenizer, shuffle=False)
    assert plain.next()[0].column("index").to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("stop", range(8))
def test_resume_is_exact_wherever_it_stops(tmp_path, tokenizer, stop):
    loader = make_loader(tmp_path, tokenizer, seed=5)
    indices(loader, stop)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make_loader(tmp_path, tokenizer, seed=5)
    resumed.load_state_dict(state)
    for (a, i), (b, j) in zip(indices(loader, 5), indices(resumed, 5), strict=True):
        assert a.equals(b) and i == j


def test_resume_with_other_data_or_batches_is_refused(tmp_path, tokenizer):
    state = make_loader(tmp_path, tokenizer).state_dict()
    for key, other in {"data.train_batch_size": dict(batch=2), "data.seed": dict(seed=1),
                       "data.shuffle": dict(shuffle=False), "data.train_files": dict(n=11)}.items():
        with pytest.raises(ValueError, match=f"{key} differs.*resume_mode=disable"):
            make_loader(tmp_path, tokenizer, **other).load_state_dict(state)


def test_batch_larger_than_the_data_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="data.train_batch_size=11 .* 10 prompts"):
        make_loader(tmp_path, tokenizer, batch=11)
