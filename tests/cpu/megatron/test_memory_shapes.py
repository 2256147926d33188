"""No tensor with a row a token and a column a word of the vocabulary is ever made, by actor or reference."""

import helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridrl.data.packed import pack


class Shapes(TorchDispatchMode):
    """Every shape of a tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return out


def record(rank, world, init, folder: str, tp: int, sp: bool) -> dict:
    from hybridrl.megatron.engine import Engine
    from hybridrl.megatron.losses import collect
    from hybridrl.ops import logprob

    logprob.CHUNK_TOKENS = 64
    coords, device = helpers.join(rank, world, init, tp)
    batch = pack(helpers.samples([(40, 150), (31, 140)]), pad_multiple=tp)
    found = {"T": len(batch.input_ids), "R": len(batch.targets), "chunk": 64}
    actor = Engine(helpers.engine_settings(folder, tp=tp, sp=sp, optim={"lr": 1e-3}), coords, device)
    reference = Engine(helpers.engine_settings(folder, tp=tp, sp=sp), coords, device)
    found["columns"] = (helpers.VOCABULARY, actor.module.head_weight.shape[0], actor.dims.vocab_padded)

    def loss(out, pack):
        return out["logprobs"].sum() + out["entropy"].sum(), {}

    def observe(name, work) -> None:
        # The backward pass runs in this thread on the CPU, so the mode sees it.
        with Shapes() as shapes:
            work()
        found[name] = sorted(shapes.seen)

    observe("actor forward", lambda: actor.run([batch], collect, train=False))
    observe("actor train", lambda: actor.run([batch], loss, train=True))
    observe("actor step", actor.step)
    observe("reference", lambda: reference.run([batch], collect, train=False))
    observe("all logits at once", lambda: torch.zeros(found["R"], 4) @ torch.zeros(4, found["columns"][1]))
    return found


def offenders(found: dict, name: str) -> list:
    """Shapes with more rows than a chunk beside a vocabulary's width, in any order of dimensions, however flattened."""
    wide = set(found["columns"])
    rows = {found["T"], found["R"]}
    flat = {r * v for r in rows for v in wide}
    return [s for s in found[name] if (wide & set(s) and rows & set(s)) or flat & set(s)]


@pytest.mark.parametrize("tp,sp", [(1, False), (2, True)])
def test_no_logits_of_a_whole_pack(models, tp, sp):
    for found in helpers.run_ranks(record, tp, models["tied"], tp, sp):
        assert found["R"] > 4 * found["chunk"]
        assert offenders(found, "all logits at once"), "the recorder would see them"
        for name in ("actor forward", "actor train", "actor step", "reference"):
            assert (found["chunk"], found["columns"][1]) in found[name] or name == "actor step"
            assert not offenders(found, name), name
