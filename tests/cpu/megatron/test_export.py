"""Weights out are weights in, bit for bit, on any split; and the folder is one that transformers loads."""

import json
import os
import shutil

import helpers
import pytest
import torch

SPLITS = {"one": (1, 1, 1, False), "tp": (2, 2, 1, False), "pp": (2, 1, 2, False), "dp": (2, 1, 1, False)}


def export(rank, world, init, folder: str, out: str, tp: int, pp: int, sp: bool) -> dict:
    from hybridrl.megatron.engine import Engine

    coords, device = helpers.join(rank, world, init, tp, pp)
    written = {}
    for dtype in ("float32", "bfloat16"):
        target = os.path.join(out, dtype)
        os.makedirs(target, exist_ok=True)
        engine = Engine(helpers.engine_settings(folder, tp=tp, pp=pp, sp=sp, dtype=dtype), coords, device)
        assert not any(p.requires_grad for p in engine.module.parameters()) and engine.optimizer is None
        written[dtype] = engine.export_hf(target)
    return written


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    known = {}

    def get(name: str, split: str):
        if (name, split) not in known:
            world, tp, pp, sp = SPLITS[split]
            out = str(tmp_path_factory.mktemp(f"{name}-{split}"))
            known[name, split] = out, helpers.run_ranks(export, world, models[name], out, tp, pp, sp)
        return known[name, split]

    return get


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("split", list(SPLITS))
def test_bit_for_bit(exported, models, name, split):
    folder, written = exported(name, split)
    expected = helpers.checkpoint_tensors(models[name])
    for dtype in (torch.float32, torch.bfloat16):
        key = str(dtype).removeprefix("torch.")
        found = helpers.checkpoint_tensors(os.path.join(folder, key))
        assert found.keys() == expected.keys()
        for tensor in found:
            assert found[tensor].dtype == dtype and torch.equal(found[tensor], expected[tensor].to(dtype)), tensor
        assert sum(w[key] for w in written) == sum(t.numel() * t.element_size() for t in found.values())
        config = json.load(open(os.path.join(folder, key, "config.json")))
        assert config["dtype"] == key and "torch_dtype" not in config
    files = sorted(f for f in os.listdir(os.path.join(folder, "float32")) if "safetensors" in f)
    assert files == (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                      "model.safetensors.index.json"] if split == "pp" else ["model.safetensors"])


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("split", ["tp", "pp"])
def test_transformers_gives_the_same_logits(exported, models, name, split):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, helpers.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        folders = (models[name], os.path.join(exported(name, split)[0], "float32"))
        before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in folders)
    assert torch.equal(before, after)


def test_export_brings_the_side_files(models, tmp_path):
    from hybridrl.weights.huggingface import copy_side_files

    source, tokenizer, out = (tmp_path / n for n in ("source", "tokenizer", "out"))
    shutil.copytree(models["tied"], source)
    for folder in (tokenizer, out):
        folder.mkdir()
    (source / "tokenizer.json").write_text("the model's")
    (tokenizer / "tokenizer.json").write_text("the given")
    (tokenizer / "merges.txt").write_text("m")
    copy_side_files(str(source), str(out), "bfloat16", str(tokenizer))
    assert (out / "tokenizer.json").read_text() == "the given" and (out / "merges.txt").exists()
    assert (out / "generation_config.json").exists() and not list(out.glob("*.safetensors"))


def refused(rank, world, init, folders: dict[str, str]) -> dict[str, str]:
    from hybridrl.megatron.engine import Engine

    coords, device = helpers.join(rank, world, init)
    found = {}
    for name, folder in folders.items():
        try:
            Engine(helpers.engine_settings(folder), coords, device)
        except ValueError as error:
            found[name] = str(error)
    return found


def edited(source: str, target, **changes) -> str:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return str(target)


def test_folders_that_do_not_fit_are_refused(models, tmp_path):
    source = models["untied"]
    folders = {
        "shape": edited(source, tmp_path / "a", hidden_size=64, head_dim=32),
        "layers": edited(source, tmp_path / "b", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "fewer layers": edited(source, tmp_path / "e", num_hidden_layers=1, layer_types=["full_attention"]),
        "biases": edited(source, tmp_path / "f", model_type="llama", architectures=["LlamaForCausalLM"]),
        "no norms": edited(source, tmp_path / "g", model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=32),
        "family": edited(source, tmp_path / "c", model_type="gpt_neox"),
        "rope": edited(
            source, tmp_path / "d", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    }
    found = helpers.run_ranks(refused, 1, folders)[0]
    assert "give (" in found["shape"] and str(folders["shape"]) in found["shape"]
    assert "model.layers.2." in found["layers"]
    assert "12 tensors" in found["fewer layers"] and "(1 layers)" in found["fewer layers"]
    assert "'model.layers.1.input_layernorm.weight'" in found["fewer layers"]
    assert folders["fewer layers"] in found["fewer layers"]
    assert "6 tensors" in found["biases"] and "k_proj.bias" in found["biases"]
    assert "bias" in found["no norms"]
    assert "gpt_neox" in found["family"] and "qwen2" in found["family"]
    assert "dynamic" in found["rope"]
