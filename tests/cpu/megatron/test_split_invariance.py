"""Any split gives one rank's loss, gradient and step: TP, TP with sequence parallelism, PP, DP, micro-batches."""

import functools
import math

import helpers
import pytest
import torch

SPLITS = {  # world, tp, pp, sequence parallelism, distributed optimizer
    "one": (1, 1, 1, False, False),
    "one-distributed": (1, 1, 1, False, True),
    "tp": (2, 2, 1, False, True),
    "tp-sp": (2, 2, 1, True, False),
    "pp": (2, 1, 2, False, True),
    "dp": (2, 1, 1, False, False),
    "dp-distributed": (2, 1, 1, False, True),
}
IN_BF16 = {"one": (1, 1, 1, False, False, "bfloat16"), "tp-sp": (2, 2, 1, True, False, "bfloat16"),
           "pp": (2, 1, 2, False, False, "bfloat16"), "dp": (2, 1, 1, False, False, "bfloat16")}
LENGTHS = [(5, 6), (9, 4), (3, 12), (7, 1), (2, 9), (11, 3)]
MICROS = [[0, 1], [2, 5], [3, 4]]  # 24, 29 and 19 tokens: TP 2 pads two of them
ROLES = ("policy-tied", "policy-untied", "value")
MODES = ("token-mean", "seq-mean-token-mean")


def loss_of(role: str, mode: str):
    from hybridrl.megatron.losses import ActorLoss, CriticLoss

    if role == "value":
        return CriticLoss(0.2, mode, None)
    return ActorLoss("vanilla", mode, 0.2, 0.28, 3.0, 0.01, True, 0.05, "low_var_kl", None)


def micros_of(engine, micros: list[list[int]]) -> list:
    from hybridrl.data.packed import pack

    table, coords = helpers.samples(LENGTHS), engine.coords
    return [pack(table.take(rows), helpers.LOSS_COLUMNS, pad_multiple=coords.tp) for rows in micros]


def train(engine, loss, denom, micros: list[list[int]]):
    """(this rank's part of the sums of the metrics, its gradient) of one pass."""
    from hybridrl.megatron.engine import sum_metrics

    parts = engine.run(micros_of(engine, micros), lambda out, pack: loss(out, pack, denom), train=True)
    return {k: float(v) for k, v in sum_metrics(parts).items()}, helpers.shards_of(engine, lambda p: p.main_grad)


def measure_role(role: str, folder: str, coords, device, split: tuple) -> dict:
    from hybridrl.algorithms.aggregation import Denominators
    from hybridrl.data.packed import pack
    from hybridrl.megatron.engine import Engine
    from hybridrl.megatron.losses import collect

    _, tp, pp, sp, distributed, *dtype = split
    dtype = dtype[0] if dtype else "float32"
    kind = "value" if role == "value" else "policy"
    engine = Engine(
        helpers.engine_settings(
            folder, kind, tp, pp, sp, dtype, distributed, optim={"lr": 1e-3, "clip_grad": 0.5}),
        coords, device)
    if role == "value" and engine.last:
        with torch.no_grad():
            engine.module.value_head.weight.copy_(torch.randn(1, 128, generator=torch.Generator().manual_seed(1)))
            engine.optimizer.inner.reload_model_params()
    whole = pack(helpers.samples(LENGTHS), helpers.LOSS_COLUMNS)
    denom = Denominators.of(whole.response_mask, whole.cu_resp)
    mine = MICROS if coords.dp == 1 else ([[0, 1], [2]], [[3, 4, 5]])[coords.dp_rank]
    out = {"forward": engine.run(micros_of(engine, [list(range(6))]), collect, train=False), "coords": coords}
    for mode in MODES:
        out[mode] = train(engine, loss_of(role, mode), denom, mine)
    if coords.dp == 1:
        out["one-micro"] = train(engine, loss_of(role, MODES[-1]), denom, [list(range(6))])
        train(engine, loss_of(role, MODES[-1]), denom, mine)
    out["stats"] = engine.step()
    out["stepped"] = helpers.shards_of(engine, lambda p: p.data)
    return out


def measure(rank, world, init, folders: dict[str, str], split: tuple) -> dict:
    coords, device = helpers.join(rank, world, init, split[1], split[2])
    path = {"policy-tied": folders["tied"], "policy-untied": folders["untied"], "value": folders["tied"]}
    return {role: measure_role(role, path[role], coords, device, split) for role in ROLES}


@pytest.fixture(scope="module")
def measured(models):
    @functools.cache
    def get(split: str) -> list[dict]:
        return helpers.run_ranks(measure, SPLITS[split][0], models, SPLITS[split])

    return get


@pytest.fixture(scope="module")
def dims(models):
    from hybridrl.megatron.config_from_hf import layout_dims, read_hf_config

    return layout_dims(read_hf_config(models["tied"]), 2)


def summed(ranks: list[dict], key: str) -> dict[str, float]:
    collectors = [r[key][0] for r in ranks if r["coords"].is_collector]
    return {k: sum(c[k] for c in collectors) for k in collectors[0]}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("split", [s for s in SPLITS if s != "one"])
def test_split_changes_nothing(measured, dims, split, role):
    """Loss and metrics 1e-6, gradient norm and each parameter's gradient 1e-5, parameters after a clipped step 1e-5."""
    one, ranks = [measured("one")[0][role]], [r[role] for r in measured(split)]
    for mode in MODES:
        expected = summed(one, mode)
        assert any(abs(v) > 1e-3 for k, v in expected.items() if "loss" in k)
        assert summed(ranks, mode) == pytest.approx(expected, rel=1e-6, abs=1e-6), mode
        if split != "dp-distributed":  # there each rank keeps the sum of its part of the buffer only
            gradient = helpers.whole_tensors(ranks, lambda r, mode=mode: r[mode][1], dims)
            helpers.close(gradient, helpers.whole_tensors(one, lambda r, mode=mode: r[mode][1], dims), 1e-5)
    norm = one[0]["stats"]["grad_norm"]
    assert norm > 0.5, "the step is to be clipped"
    for result in ranks:
        assert result["stats"]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert result["stats"]["skipped_steps"] == 0 and result["stats"]["lr"] == 1e-3
    stepped = helpers.whole_tensors(ranks, lambda r: r["stepped"], dims)
    helpers.close(stepped, helpers.whole_tensors(one, lambda r: r["stepped"], dims), 1e-5)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("split", ["one", "tp-sp", "pp"])
def test_number_of_micro_batches_changes_nothing(measured, dims, split, role):
    ranks, mode = [r[role] for r in measured(split)], MODES[-1]
    assert summed(ranks, "one-micro") == pytest.approx(summed(ranks, mode), rel=1e-6, abs=1e-6)
    three = helpers.whole_tensors(ranks, lambda r: r[mode][1], dims)
    helpers.close(helpers.whole_tensors(ranks, lambda r: r["one-micro"][1], dims), three, 1e-5)


@pytest.mark.parametrize("split", ["one", "tp", "tp-sp", "pp"])
def test_gradient_norm_is_that_of_the_gradient(measured, dims, split):
    """Each shard counts once and each copy once, the tied embedding's on two stages too."""
    for role in ROLES:
        ranks = [r[role] for r in measured(split)]
        gradient = helpers.whole_tensors(ranks, lambda r: r[MODES[-1]][1], dims)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        assert ranks[0]["stats"]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_step_moves_every_parameter(measured, dims, models):
    """A parameter that no gradient reaches would pass every comparison above."""
    for role, folder in (("policy-tied", "tied"), ("policy-untied", "untied"), ("value", "tied")):
        before = helpers.checkpoint_tensors(models[folder])
        after = helpers.whole_tensors([measured("one")[0][role]], lambda r: r["stepped"], dims)
        assert after.keys() - before.keys() == ({"value_head.weight"} if role == "value" else set())
        for name in before:
            assert name.startswith("lm_head") and role == "value" or not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("role", ["policy-tied", "policy-untied"])
def test_logprobs_equal_transformers(measured, models, split, role):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[role.removeprefix("policy-")], dtype=torch.float32)
    table = helpers.samples(LENGTHS)
    logprobs, entropy = [], []
    for prompt, response in zip(table.table["prompt_ids"].to_pylist(), table.table["response_ids"].to_pylist()):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits.double(), -1)
        logprobs.append(logp.gather(1, torch.tensor(response)[:, None]).squeeze(1))
        entropy.append(-(logp.exp() * logp).sum(-1))
    for result in measured(split):
        for part in result[role]["forward"]:
            torch.testing.assert_close(part["logprobs"].double(), torch.cat(logprobs), rtol=0, atol=1e-4)
            torch.testing.assert_close(part["entropy"].double(), torch.cat(entropy), rtol=0, atol=1e-4)
    assert any(result[role]["forward"] for result in measured(split))


@pytest.mark.parametrize("split", list(SPLITS))
def test_values_equal_transformers_backbone_and_a_linear_head(measured, models, split):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(models["tied"], dtype=torch.float32)
    head, table, values = torch.randn(128, generator=torch.Generator().manual_seed(1)), helpers.samples(LENGTHS), []
    for prompt, response in zip(table.table["prompt_ids"].to_pylist(), table.table["response_ids"].to_pylist()):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        values.append(hidden.double() @ head.double())
    found = [part["values"].double() for result in measured(split) for part in result["value"]["forward"]]
    assert found and torch.cat(values).std() > 1
    for part in found:
        torch.testing.assert_close(part, torch.cat(values), rtol=1e-5, atol=1e-4)


def in_transformers(folder: str, role: str):
    """(model with gradients of the loss over all samples, gradient of the value head), by plain autograd."""
    from transformers import AutoModel, AutoModelForCausalLM

    from hybridrl.algorithms.aggregation import Denominators
    from hybridrl.data.packed import pack

    table = helpers.samples(LENGTHS)
    whole = pack(table, helpers.LOSS_COLUMNS)
    model = (AutoModel if role == "value" else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    head = torch.randn(128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = {"logprobs": [], "entropy": [], "values": []}
    for prompt, response in zip(table.table["prompt_ids"].to_pylist(), table.table["response_ids"].to_pylist()):
        out, rows = model(torch.tensor([prompt + response])), slice(len(prompt) - 1, -1)
        if role == "value":
            found["values"].append(out.last_hidden_state[0, rows] @ head)
            continue
        logp = torch.log_softmax(out.logits[0, rows], -1)
        found["logprobs"].append(logp.gather(1, torch.tensor(response)[:, None]).squeeze(1))
        found["entropy"].append(-(logp.exp() * logp).sum(-1))
    outputs = {name: torch.cat(parts) for name, parts in found.items() if parts}
    denom = Denominators.of(whole.response_mask, whole.cu_resp)
    loss, metrics = loss_of(role, MODES[0])(outputs, whole, denom)
    loss.backward()
    prefix = "model." if role == "value" else ""
    gradients = {prefix + name: p.grad for name, p in model.named_parameters()}
    if role == "value":
        gradients["value_head.weight"] = head.grad[None]
    return {k: float(v) for k, v in metrics.items()}, gradients


@pytest.mark.parametrize("role", ROLES)
def test_loss_and_gradient_equal_autograd_in_transformers(measured, models, dims, role):
    """In three micro-batches, in absolute scale: Megatron divides nothing by tokens, ranks or micro-batches."""
    metrics, gradients = in_transformers(models["untied" if role == "policy-untied" else "tied"], role)
    for split in ("one", "tp-sp", "dp"):
        ranks = [r[role] for r in measured(split)]
        assert summed(ranks, MODES[0]) == pytest.approx(metrics, rel=1e-5, abs=1e-5)
        helpers.close(helpers.whole_tensors(ranks, lambda r: r[MODES[0]][1], dims), gradients, 1e-4)


@pytest.mark.parametrize("split", list(IN_BF16))
def test_bfloat16_is_near_float32(measured, models, dims, split):
    """A gradient that is wrong rather than rounded is off by more than the 3 percent or so of bfloat16."""
    found = helpers.run_ranks(measure, IN_BF16[split][0], models, IN_BF16[split])
    for role in ROLES:
        one, ranks = [measured("one")[0][role]], [r[role] for r in found]
        expected = summed(one, MODES[0])
        for name, value in summed(ranks, MODES[0]).items():
            assert "clipfrac" in name or value == pytest.approx(expected[name], rel=0.05, abs=0.02), name
        exact = helpers.whole_tensors(one, lambda r: r[MODES[0]][1], dims)
        helpers.close(helpers.whole_tensors(ranks, lambda r: r[MODES[0]][1], dims), exact, 0.1)
        assert ranks[0]["stats"]["grad_norm"] == pytest.approx(one[0]["stats"]["grad_norm"], rel=0.05)
