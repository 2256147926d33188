"""A rank's part of a training checkpoint: parameters, optimizer, schedule, RNG. Restored bit for bit on the same split.

A run that wants another split starts from the Hugging Face export (`actor_rollout_ref.model.path`).
"""

import os

import torch

from hybridrl.megatron.engine import Engine


def _file(engine: Engine, folder: str) -> str:
    return os.path.join(folder, f"rank_{engine.coords.rank:05d}.pt")


def layout_of(engine: Engine) -> dict:
    """What must be the same for a checkpoint to fit: the split and every parameter's shape and dtype."""
    shapes = {n: (tuple(p.shape), str(p.dtype)) for n, p in engine.named_parameters()}
    c = engine.coords
    return {
        "world": c.world,
        "tp": c.tp,
        "pp": c.pp,
        "virtual stages": engine.virtual or 1,
        "model_type": engine.hf_config.model_type,
        "parameters": shapes,
    }


def save_rank(engine: Engine, folder: str) -> None:
    """Writes this rank's file and syncs it to the disk. OSError when that fails (a full disk, say)."""
    os.makedirs(folder, exist_ok=True)
    state = {
        "layout": layout_of(engine),
        "model": {n: p.detach().cpu() for n, p in engine.named_parameters()},
        "optimizer": engine.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    with open(_file(engine, folder), "wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())


@torch.no_grad()
def load_rank(engine: Engine, folder: str) -> None:
    """Restores this rank. ValueError for a missing file, another split or another model."""
    path = _file(engine, folder)
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} is missing: the checkpoint was made by fewer ranks. Mend: resume with the same split."
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    mine, saved = layout_of(engine), state["layout"]
    for key in ("world", "tp", "pp", "virtual stages", "model_type"):
        if mine[key] != saved[key]:
            raise ValueError(
                f"checkpoint {folder} has {key}={saved[key]}, this run has {mine[key]}. Mend: resume with the same "
                "layout, or start from a Hugging Face export with actor_rollout_ref.model.path."
            )
    if mine["parameters"] != saved["parameters"]:
        names = sorted(k for k, v in mine["parameters"].items() if saved["parameters"].get(k) != v)
        raise ValueError(f"checkpoint {folder} is of another model: {names[:3]} differ. Mend: check model.path.")
    for name, param in engine.named_parameters():
        param.copy_(state["model"][name])
    engine.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
