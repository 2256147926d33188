"""Every family, tied and untied, on every split: transformers' log-probs and values, and its weights bit for bit."""

import functools
import os

import helpers
import pytest
import torch

SPLITS = {"one": (1, 1, 1, False, None), "tp-sp": (2, 2, 1, True, None), "pp-virtual": (2, 1, 2, False, 2)}
LENGTHS = [(5, 6), (40, 30), (3, 12), (7, 1)]  # past the 16 positions that the Llama 3 frequencies begin with
NAMES = [f"{family}-{tied}" for family in helpers.FAMILIES for tied in ("tied", "untied")]


def measure(rank, world, init, folders: dict[str, str], out: str, tp: int, pp: int, sp: bool, virtual) -> dict:
    from hybridrl.data.packed import pack
    from hybridrl.megatron.engine import Engine
    from hybridrl.megatron.losses import collect

    coords, device = helpers.join(rank, world, init, tp, pp)
    batch, found = pack(helpers.samples(LENGTHS), pad_multiple=tp), {}
    for name, folder in folders.items():
        target = os.path.join(out, name)
        os.makedirs(target, exist_ok=True)
        engine = Engine(helpers.engine_settings(folder, tp=tp, pp=pp, sp=sp, virtual=virtual), coords, device)
        parts = engine.run([batch], collect, train=False)
        engine.export_hf(target)
        critic = Engine(helpers.engine_settings(folder, "value", tp, pp, sp, virtual=virtual), coords, device)
        if critic.last:
            critic.module.value_head.weight.copy_(torch.randn(1, 128, generator=torch.Generator().manual_seed(1)))
        values = critic.run([batch], collect, train=False)
        assert len(parts) == len(values) == int(engine.last)
        found[name] = [part | value for part, value in zip(parts, values)]
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {name: helpers.save_model(tmp_path_factory.mktemp(name), name.endswith("-tied"), 4,
                                     family=name.split("-")[0]) for name in NAMES}


@pytest.fixture(scope="module")
def measured(folders, tmp_path_factory):
    @functools.cache
    def get(split: str):
        world, *how = SPLITS[split]
        out = str(tmp_path_factory.mktemp(split))
        return helpers.run_ranks(measure, world, folders, out, *how), out

    return get


@pytest.fixture(scope="module")
def expected(folders):
    @functools.cache
    def get(name: str) -> dict[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
        head, found = torch.randn(128, generator=torch.Generator().manual_seed(1)), {"logprobs": [], "values": []}
        rows = helpers.samples(LENGTHS).table
        for prompt, response in zip(rows["prompt_ids"].to_pylist(), rows["response_ids"].to_pylist()):
            ids, own = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
            with torch.no_grad():
                found["values"].append(model.model(ids).last_hidden_state[0, own] @ head)
                logp = torch.log_softmax(model(ids).logits[0, own], -1)
            found["logprobs"].append(logp.gather(1, torch.tensor(response)[:, None]).squeeze(1))
        return {key: torch.cat(parts) for key, parts in found.items()}

    return get


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("name", NAMES)
def test_logprobs_and_values_equal_transformers(measured, expected, name, split):
    found = [part for rank in measured(split)[0] for part in rank[name]]
    assert found
    for part in found:
        for key, tensor in expected(name).items():
            torch.testing.assert_close(part[key], tensor, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("name", NAMES)
def test_exported_bit_for_bit(measured, folders, name, split):
    found = helpers.checkpoint_tensors(os.path.join(measured(split)[1], name))
    source = helpers.checkpoint_tensors(folders[name])
    assert found.keys() == source.keys() and all(torch.equal(found[key], source[key]) for key in found)


def test_families_differ_where_they_should(expected):
    """The settings that the families add are not lost on both sides alike."""
    assert not torch.allclose(expected("llama3-tied")["values"], expected("linear-tied")["values"], atol=1e-2)
