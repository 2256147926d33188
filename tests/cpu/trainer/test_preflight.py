"""Preflight: each kind of bad input is a clear error naming its key, found without starting or writing anything."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridrl.config import ConfigError, PPOConfig, SFTConfig
from hybridrl.configuration import Machine, check, load, resolve
from hybridrl.data import tiny_model
from hybridrl.data.preprocess import arithmetic
from hybridrl.data.preprocess.rows import write_rows
from hybridrl.trainer.preflight import check_inputs

CPU = Machine("cpu", 0, 2, 16.0)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A model folder and a data file as a run would read them."""
    folder = tmp_path_factory.mktemp("origin")
    write_rows(arithmetic.make_demonstrations(100, 3, 0.5, 1), folder / "sft.parquet")
    tiny_model.make_checkpoint(
        tiny_model.parse(["--out", str(folder / "model"), "--data", str(folder / "sft.parquet")])
    )
    table = pa.table({"prompt": [[{"role": "user", "content": "1+1"}]], "data_source": ["arithmetic"]})
    pq.write_table(table, folder / "train.parquet")
    return folder


@pytest.fixture
def place(origin, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(origin, tmp_path / "in")
    return tmp_path / "in"


def ppo(place, *argv):
    words = [
        f"data.train_files={place}/train.parquet",
        f"actor_rollout_ref.model.path={place}/model",
        f"trainer.default_local_dir={place}/run",
        "trainer.n_gpus_per_node=2",
        "data.max_response_length=64",
    ]
    config, _ = load(PPOConfig, [*words, *argv], "ppo")
    check(config)
    return resolve(config, CPU)


def problems(resolved):
    with pytest.raises(ConfigError) as caught:
        check_inputs(resolved)
    return caught.value.problems


def edit(place, **fields):
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_good_inputs_pass_and_nothing_is_written(place):
    before = sorted(place.rglob("*"))
    check_inputs(ppo(place, "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2"))
    assert sorted(place.rglob("*")) == before


def test_missing_things_are_reported_together(place):
    found = problems(ppo(place, "actor_rollout_ref.model.path=Qwen/Qwen2-7B", "data.val_files=/nowhere/v.parquet"))
    assert len(found) == 2
    assert found[0].startswith("actor_rollout_ref.model.path=Qwen/Qwen2-7B") and "hf download Qwen/Qwen2-7B" in found[0]
    assert found[1].startswith("data.val_files: /nowhere/v.parquet does not exist")


@pytest.mark.parametrize("remove, words", [
    ("config.json", "no config.json"),
    ("model.safetensors", "no model.safetensors"),
    ("tokenizer.json", "no tokenizer in it"),
])  # fmt: skip
def test_incomplete_model_folder(place, remove, words):
    (place / "model" / remove).unlink()
    assert any(
        words in problem and problem.startswith("actor_rollout_ref.model.path") for problem in problems(ppo(place))
    )


def test_missing_shard_of_an_indexed_checkpoint(place):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (place / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "model" / "model.safetensors").rename(place / "model" / "model-00001-of-00002.safetensors")
    (found,) = problems(ppo(place))
    assert "1 weight files are missing, such as model-00002-of-00002.safetensors" in found


@pytest.mark.parametrize("fields, words", [
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "'gpt2' is not supported"),
    ({"num_attention_heads": 8}, "heads have 16 dimensions and vLLM on CPU takes 32 or more"),
    ({"max_position_embeddings": 128}, "the model has 128 positions"),
    ({"vocab_size": 100}, "the model's vocab_size is 100"),
])  # fmt: skip
def test_unsuitable_models(place, fields, words):
    edit(place, **fields)
    assert any(words in problem for problem in problems(ppo(place)))


def test_explicit_head_dim_counts(place):
    edit(place, num_attention_heads=8, head_dim=32)
    check_inputs(ppo(place))


def test_tensor_parallelism_must_divide_the_heads(place):
    found = problems(
        ppo(place, "trainer.n_gpus_per_node=4", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4")
    )
    assert found == [
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4 does not divide the 2 key/value heads of "
        "actor_rollout_ref.model.path; choose a divisor"
    ]


def test_stages_must_divide_the_layers(place):
    edit(place, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    (found,) = problems(ppo(place, "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2"))
    assert found.startswith(
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2 does not divide the 3 layers"
    )


def test_critic_of_another_vocabulary(place):
    shutil.copytree(place / "model", place / "critic")
    edit(place, vocab_size=640)
    (found,) = problems(ppo(place, f"critic.model.path={place}/critic"))
    assert found.startswith("critic.model.path=") and "640" in found


def test_critic_missing_while_off_is_no_problem(place):
    off = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2"]
    assert problems(ppo(place, "critic.model.path=/nowhere"))[0].startswith("critic.model.path=/nowhere")
    check_inputs(ppo(place, "critic.model.path=/nowhere", *off))


def test_truncated_parquet_wrong_column_and_folder(place):
    whole = (place / "train.parquet").read_bytes()
    (place / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "not a whole Parquet file" in problems(ppo(place, f"data.val_files={place}/cut.parquet"))[0]
    assert "is a folder" in problems(ppo(place, f"data.val_files={place}"))[0]
    (found,) = problems(ppo(place, "data.prompt_key=question"))
    assert found.startswith("data.prompt_key=question") and "data_source" in found
    assert problems(ppo(place, "data.reward_fn_key=source"))[0].startswith("data.reward_fn_key=source")


def test_output_folder_that_is_a_file(place):
    (place / "file").write_text("")
    found = problems(ppo(place, f"trainer.default_local_dir={place}/file/run"))
    assert found[0].startswith("trainer.rollout_data_dir") and found[1].startswith("trainer.default_local_dir")
    assert "is a file" in found[1]


def test_reward_file_and_resume_folder(place):
    found = problems(
        ppo(
            place,
            "custom_reward_function.path=/no.py",
            "trainer.resume_mode=resume_path",
            "trainer.resume_from_path=/no",
        )
    )
    assert found[0].startswith("custom_reward_function.path=/no.py")
    assert found[1].startswith("trainer.resume_from_path=/no")


def test_supervised_run(place):
    words = [
        f"data.train_files={place}/sft.parquet",
        f"model.path={place}/model",
        f"trainer.default_local_dir={place}/run",
    ]
    config, _ = load(SFTConfig, words, "sft")
    check(config)
    check_inputs(resolve(config, CPU, world=2))
    config, _ = load(SFTConfig, [*words, "data.response_key=answer", "model.path=/nowhere"], "sft")
    found = problems(resolve(config, CPU, world=2))
    assert found[0].startswith("model.path=/nowhere") and found[1].startswith("data.response_key=answer")
