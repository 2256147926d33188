"""The optimizer's step, its schedules, and training that goes on from a checkpoint bit for bit."""

import math
import os

import helpers
import pytest
import torch

LENGTHS = [(5, 6), (9, 4), (3, 12), (7, 1)]


def learn(engine, step: int, scale: float = 1.0) -> dict[str, float]:
    """One optimizer step on samples of their own, on this data-parallel rank's half of them."""
    from hybridrl.data.packed import pack

    rows = list(range(4)) if engine.coords.dp == 1 else [[0, 1], [2, 3]][engine.coords.dp_rank]
    batch = pack(helpers.samples(LENGTHS, seed=step).take(rows), helpers.LOSS_COLUMNS, pad_multiple=engine.coords.tp)

    def loss(out, pack):
        if "values" in out:
            return scale * (out["values"] - pack.columns["returns"]).square().sum() / 23, {}
        return -scale * (out["logprobs"] * pack.columns["advantages"]).sum() / 23, {}

    engine.run([batch], loss, train=True)
    return engine.step()


def weights(engine) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def engine_of(folder: str, coords, device, role: str = "policy", optim: dict | None = None, total: int = 4, **options):
    from hybridrl.megatron.engine import Engine

    settings = helpers.engine_settings(
        folder, role, coords.tp, coords.pp, optim={"lr": 1e-3, **(optim or {})}, total_steps=total, **options)
    return Engine(settings, coords, device)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- schedules -----------------------------------------------------------------------------------------------------

SCHEDULES = [  # optim, total steps, lr of each step
    ({}, 4, [1e-3] * 5),
    ({"lr_warmup_steps": 2}, 5, [0.0, 5e-4, 1e-3, 1e-3, 1e-3]),
    ({"lr_warmup_steps_ratio": 0.5}, 4, [0.0, 5e-4, 1e-3, 1e-3]),
    ({"lr_warmup_steps": 0, "lr_warmup_steps_ratio": 0.5}, 4, [1e-3] * 4),
    ({"lr_decay_style": "linear"}, 4, [1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0, 0.0]),
    ({"lr_decay_style": "linear", "min_lr": 2e-4}, 4, [1e-3, 8e-4, 6e-4, 4e-4, 2e-4, 2e-4]),
    ({"lr_decay_style": "cosine"}, 4, [5e-4 * (1 + math.cos(math.pi * i / 4)) for i in range(5)] + [0.0]),
    ({"lr_decay_style": "cosine", "lr_warmup_steps": 2}, 4, [0.0, 5e-4, 1e-3, 5e-4, 0.0]),
    ({"lr_warmup_steps": 4}, 4, [0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3]),
    ({"lr": 0.0, "lr_decay_style": "linear"}, 4, [0.0] * 4),
]


def schedules(rank, world, init, folder: str) -> list[list[float]]:
    from hybridrl.config import Megatron, Optim
    from hybridrl.megatron.optimizer import Optimizer

    coords, device = helpers.join(rank, world, init)
    model = engine_of(folder, coords, device).model
    megatron, found = Megatron(dtype="float32"), []
    for optim, total, expected in SCHEDULES:
        optimizer = Optimizer(model, Optim(**{"lr": 1e-3, **optim}), megatron, total)
        found.append([])
        for _ in expected:
            model[0].zero_grad_buffer()
            for param in model[0].parameters():
                param.main_grad.fill_(1e-3)
            found[-1].append(optimizer.step()["lr"])
    return found


def test_schedules(models):
    for (optim, total, expected), found in zip(SCHEDULES, helpers.run_ranks(schedules, 1, models["tied"])[0]):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), (optim, total)


# -- one step ------------------------------------------------------------------------------------------------------


def steps(rank, world, init, folder: str, dtype: str) -> dict:
    coords, device = helpers.join(rank, world, init)
    engine, found = engine_of(folder, coords, device, dtype=dtype, optim={"clip_grad": 0.0}), {}
    before, learned = weights(engine), learn(engine, 0)
    found["step"] = learned
    after = weights(engine)
    found["moved"] = not equal(before, after)
    for bad in (float("nan"), float("inf")):
        found[str(bad)] = learn(engine, 1, scale=bad)
        found[f"{bad} left alone"] = equal(weights(engine), after)
    found["next"] = learn(engine, 2)
    found["goes on"] = not equal(weights(engine), after) and all(w.isfinite().all() for w in weights(engine).values())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 2])
def test_non_finite_gradients_skip_the_step(models, dtype, world):
    for found in helpers.run_ranks(steps, world, models["tied"], dtype):
        assert found["moved"] and found["step"]["skipped_steps"] == 0
        for i, bad in enumerate(("nan", "inf"), 1):
            assert not math.isfinite(found[bad]["grad_norm"]) and found[bad]["skipped_steps"] == i
            assert found[f"{bad} left alone"]
        assert found["next"]["skipped_steps"] == 2 and found["goes on"]


def clipped(rank, world, init, folder: str) -> dict[float, tuple]:
    """Per clip_grad: grad_norm reported, and the norm of what the optimizer was given."""
    coords, device = helpers.join(rank, world, init)
    found = {}
    for clip in (0.0, 1e6, 0.25):
        engine = engine_of(folder, coords, device, optim={"clip_grad": clip, "weight_decay": 0.0})
        norm = learn(engine, 0)["grad_norm"]
        moments = [s["exp_avg"] for s in _torch_state(engine)]
        found[clip] = norm, math.sqrt(sum(float(m.double().square().sum()) for m in moments)) / 0.1  # 1 - beta1
    return found


def _torch_state(engine) -> list[dict]:
    parts = getattr(engine.optimizer.inner, "chained_optimizers", [engine.optimizer.inner])
    return [state for part in parts for state in part.optimizer.state.values()]


def test_clipping(models):
    found = helpers.run_ranks(clipped, 1, models["tied"])[0]
    norm = found[0.0][0]
    assert norm > 0.5 and all(f[0] == norm for f in found.values()), "the norm is that before clipping"
    assert found[0.0][1] == pytest.approx(norm, rel=1e-5) and found[0.0] == found[1e6]
    assert found[0.25][1] == pytest.approx(0.25, rel=1e-4)


def adamw(rank, world, init, folder: str) -> tuple:
    """Weights after two steps of the engine, and of torch.optim.AdamW on the same gradients."""
    coords, device = helpers.join(rank, world, init)
    optim = {"clip_grad": 0.0, "weight_decay": 0.1, "betas": [0.8, 0.95], "lr_decay_style": "linear"}
    engine = engine_of(folder, coords, device, optim=optim)
    ours = {n: p.detach().clone().requires_grad_() for n, p in engine.module.named_parameters()}
    plain = [p for p in ours.values() if p.dim() == 1]
    matrices = [p for p in ours.values() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), eps=1e-8)
    for step in range(2):
        lr = learn(engine, step)["lr"]
        for group in reference.param_groups:
            group["lr"] = lr
        for name, param in engine.module.named_parameters():
            ours[name].grad = param.main_grad.clone()
        reference.step()
    return weights(engine), {n: p.detach() for n, p in ours.items()}


def test_is_adamw_without_decay_of_norms_and_biases(models):
    found, expected = helpers.run_ranks(adamw, 1, models["untied"])[0]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


# -- resume --------------------------------------------------------------------------------------------------------

RESUMES = [  # world, tp, pp, role, options
    (1, 1, 1, "policy", dict(dtype="float32", distributed=True)),
    (1, 1, 1, "policy", dict(dtype="bfloat16", distributed=False)),
    (1, 1, 1, "value", dict(dtype="bfloat16", distributed=True)),
    (2, 2, 1, "policy", dict(dtype="float32", distributed=False, sp=True)),
    (2, 1, 1, "policy", dict(dtype="bfloat16", distributed=True)),
    (2, 1, 1, "value", dict(dtype="float32", distributed=True)),
    (2, 1, 2, "policy", dict(dtype="bfloat16", distributed=True)),
]
OPTIM = {"lr_decay_style": "cosine", "lr_warmup_steps": 1, "clip_grad": 0.3, "lr": 1e-2}


def resume(rank, world, init, folder: str, out: str, case: tuple) -> dict:
    from hybridrl.megatron import checkpoint

    _, tp, pp, role, options = case
    coords, device = helpers.join(rank, world, init, tp, pp)

    def fresh():
        return engine_of(folder, coords, device, role, OPTIM, total=5, **options)

    straight = fresh()
    stats = [learn(straight, step) for step in range(2)]
    learn(straight, 7, scale=float("nan"))  # a skipped step is part of the state, too
    checkpoint.save_rank(straight, out)
    random = torch.rand(3)
    stats = [learn(straight, step) for step in range(2, 4)]
    again = fresh()
    start = weights(again)
    checkpoint.load_rank(again, out)
    return {
        "random": torch.equal(random, torch.rand(3)),
        "stats": (stats, [learn(again, step) for step in range(2, 4)]),
        "weights": (weights(straight), weights(again)),
        "moved": not equal(start, weights(straight)),
        "state": (straight.optimizer.state_dict(), again.optimizer.state_dict()),
    }


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("case", RESUMES, ids=lambda c: f"{c[0]}-tp{c[1]}-pp{c[2]}-{c[3]}-{c[4]['dtype']}")
def test_resumed_training_is_the_uninterrupted_one(models, tmp_path, case):
    for found in helpers.run_ranks(resume, case[0], models["tied"], str(tmp_path), case):
        assert found["moved"] and found["random"]
        assert same(*found["stats"]) and found["stats"][0][-1]["skipped_steps"] == 1
        assert same(*found["weights"])
        assert same(*found["state"])
    assert sorted(os.listdir(tmp_path)) == [f"rank_{i:05d}.pt" for i in range(case[0])]


def changed_settings(rank, world, init, folder: str, out: str) -> dict:
    from hybridrl.megatron import checkpoint

    coords, device = helpers.join(rank, world, init)
    first = engine_of(folder, coords, device)
    learn(first, 0)
    checkpoint.save_rank(first, out)
    changed = engine_of(folder, coords, device, optim={"lr": 3e-5, "weight_decay": 0.5, "betas": [0.5, 0.6]})
    checkpoint.load_rank(changed, out)
    groups = changed.optimizer.inner.param_groups
    found = {"lrs": [learn(changed, step)["lr"] for step in (1, 2)]}
    return {**found, "betas": {tuple(g["betas"]) for g in groups}, "decay": max(g["weight_decay"] for g in groups)}


def test_settings_of_the_run_win_over_those_of_the_checkpoint(models, tmp_path):
    found = helpers.run_ranks(changed_settings, 1, models["tied"], str(tmp_path))[0]
    assert found["lrs"] == [3e-5, 3e-5] and found["decay"] == 0.5 and found["betas"] == {(0.5, 0.6)}


def refusals(rank, world, init, models: dict[str, str], out: str) -> dict[str, str]:
    from hybridrl.megatron import checkpoint

    coords, device = helpers.join(rank, world, init, tp=world)
    found = {}

    def attempt(name: str, engine) -> None:
        before = weights(engine)
        try:
            checkpoint.load_rank(engine, os.path.join(out, name))
        except ValueError as error:
            found[name] = str(error)
        assert equal(before, weights(engine)), "a refused checkpoint changes nothing"

    if world == 1:
        for name, options in (("world", {}), ("model", {}), ("dtype", {}), ("role", {"role": "value"})):
            engine = engine_of(models["untied"], coords, device, **options)
            checkpoint.save_rank(engine, os.path.join(out, name))
        attempt("missing", engine_of(models["untied"], coords, device))
        attempt("model", engine_of(models["tied"], coords, device))
        attempt("dtype", engine_of(models["untied"], coords, device, dtype="bfloat16"))
        attempt("role", engine_of(models["untied"], coords, device))
    else:
        attempt("world", engine_of(models["untied"], coords, device))
    return found


def test_other_split_or_model_is_refused(models, tmp_path):
    found = helpers.run_ranks(refusals, 1, models, str(tmp_path))[0]
    assert "rank_00000.pt is missing" in found["missing"] and "Mend" in found["missing"]
    assert "another model" in found["model"] and "model.path" in found["model"]
    assert "another model" in found["dtype"] and "another model" in found["role"]
    first, second = helpers.run_ranks(refusals, 2, models, str(tmp_path))
    assert "world=1, this run has 2" in first["world"] and "Mend: resume with the same layout" in first["world"]
    assert "rank_00001.pt is missing" in second["world"] and "same split" in second["world"]
