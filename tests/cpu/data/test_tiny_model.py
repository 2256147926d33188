"""The small checkpoint: loads in transformers, splits digits, round-trips text, refuses shapes others cannot take."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridrl.data import tiny_model
from hybridrl.data.preprocess import arithmetic
from hybridrl.data.preprocess.rows import write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "sft_train.parquet"
    write_rows(arithmetic.make_demonstrations(300, 3, 0.5, 1), path)
    return path


def make(data, out, *argv):
    tiny_model.make_checkpoint(tiny_model.parse(["--out", str(out), "--data", str(data), *argv]))
    return out


def test_checkpoint_loads_and_is_seeded(data, tmp_path):
    out = make(data, tmp_path / "m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    config = model.config
    assert config.model_type == "qwen2" and config.vocab_size % 64 == 0 and config.vocab_size >= len(tokenizer)
    assert config.hidden_size // config.num_attention_heads >= 32 and config.num_key_value_heads % 2 == 0
    assert not config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    again = AutoModelForCausalLM.from_pretrained(make(data, tmp_path / "again"))
    other = AutoModelForCausalLM.from_pretrained(make(data, tmp_path / "other", "--seed", "2"))
    x, y, z = (m.model.layers[0].mlp.up_proj.weight for m in (model, again, other))
    assert torch.equal(x, y) and not torch.equal(x, z)


def test_tokenizer_splits_digits_and_round_trips(data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make(data, tmp_path / "m"))
    tokens = tokenizer.tokenize("348+276=624 #### 624")
    assert [t for t in tokens if t.strip("Ġ").isdigit()] == list("348276624624") and len(tokens) <= 16
    for text in ("#### 12\n", "Ünïcödé 漢字 ~ { }", " a  b "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1 + 2?"}], tokenize=False,
                                           add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) <= 20 and ids.count(tokenizer.eos_token_id) == 1


def test_tied_bfloat16_and_replacing_an_older_one(data, tmp_path):
    make(data, tmp_path / "m")
    out = make(data, tmp_path / "m", "--tie_word_embeddings", "--dtype", "bfloat16", "--num_layers", "1")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.config.tie_word_embeddings and model.dtype == torch.bfloat16 and len(model.model.layers) == 1
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("argv, match", [
    (["--num_attention_heads", "8"], "at least 32"),
    (["--num_attention_heads", "3"], "at least 32"),
    (["--num_key_value_heads", "1"], "must be even"),
    (["--num_key_value_heads", "3"], "must be even"),
])
def test_bad_shapes(data, tmp_path, argv, match):
    with pytest.raises(ValueError, match=match):
        make(data, tmp_path / "m", *argv)
    assert not (tmp_path / "m").exists()


def test_foreign_folder_and_missing_data_are_refused(data, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no model"):
        make(data, tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").exists()
    with pytest.raises(ValueError, match="--data: no such file"):
        make(tmp_path / "none.parquet", tmp_path / "m")
