"""Checkpoints of a run: whole or not there. Layout below the run folder, with verl's names:

    global_step_N/actor/rank_*.pt, critic/rank_*.pt   the ranks' parts (hybridrl.megatron.checkpoint)
    global_step_N/actor/huggingface/                  with hf_model among save_contents
    global_step_N/trainer.json                        step, data position, KL controller, layout
    global_step_N/files.json                          size and checksum of all others
    latest_checkpointed_iteration.txt                 N of the newest whole one

A save writes global_step_N.tmp, syncs it, renames it, then points the text file at it: killed at any moment, the newest
named folder is whole. One that was damaged afterwards is known by files.json and passed over.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
_FILES = "files.json"
_END = 2**20  # bytes at either end of a file that its checksum covers
_STEP = re.compile(r"global_step_(\d+)")


def save(run_dir: str, step: int, write: Callable[[str], None], state: dict, keep: int | None) -> Path:
    """Saves step `step`: `write(folder)` has the ranks write their parts. Then drops all but the newest `keep`.

    OSError (a full disk) leaves earlier checkpoints as they were and the unfinished folder removed.
    """
    final = Path(run_dir).absolute() / f"global_step_{step}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(str(temporary))
        _write_synced(temporary / "trainer.json", json.dumps(state, indent=2))
        _write_synced(temporary / _FILES, json.dumps(_describe(temporary), indent=2))
        _sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    _write_synced(final.parent / f".{LATEST}", f"{step}\n")
    os.rename(final.parent / f".{LATEST}", final.parent / LATEST)
    _sync_folder(final.parent)
    if keep is not None:
        # A run that went back to an earlier step has higher ones from before: this one stays whatever its number.
        others = [old for old in steps(run_dir) if old != step]
        for old in others[: max(0, len(others) + 1 - keep)]:
            shutil.rmtree(final.parent / f"global_step_{old}", ignore_errors=True)
    return final


def steps(run_dir: str) -> list[int]:
    """Steps of the whole checkpoints below a run folder."""
    return [step for step, why in _look(run_dir) if not why]


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, "" if it is whole. A flipped bit inside a large file is left to torch.load."""
    try:
        read_state(folder)
        wanted = json.loads((folder / _FILES).read_text()) if (folder / _FILES).is_file() else {}
        for name, facts in wanted.items():
            if _facts(folder / name) != facts:
                return f"{name} is not as it was saved"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _look(run_dir: str) -> list[tuple[int, str]]:
    """(step, damage) of every finished checkpoint, ascending."""
    folder = Path(run_dir)
    found = folder.glob("global_step_*/trainer.json") if folder.is_dir() else []
    return sorted((int(m[1]), damage(p.parent)) for p in found if (m := _STEP.fullmatch(p.parent.name)))


def _describe(folder: Path) -> dict[str, list[int]]:
    return {str(p.relative_to(folder)): _facts(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _facts(path: Path) -> list[int]:
    """Size, and CRC-32 of both ends."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        checksum = zlib.crc32(file.read(_END))
        file.seek(max(size - _END, 0))
        return [size, zlib.crc32(file.read(_END), checksum)]


def find(run_dir: str, mode: str, path: str | None) -> Path | None:
    """The folder to resume from: None for mode disable, or auto without a checkpoint. ValueError for a bad path.

    auto takes the one saved last, which is the newest unless the run went back to an earlier step; the newest whole one
    if that is damaged. ValueError if all there are are damaged: to start anew would write over them.
    """
    if mode == "disable":
        return None
    if mode == "resume_path":
        folder = Path(path or "")
        if not (folder / "trainer.json").is_file():
            raise ValueError(
                f"trainer.resume_from_path={path} is no whole checkpoint (a global_step_N folder with trainer.json). "
                f"Whole ones in {run_dir}: {steps(run_dir) or 'none'}."
            )
        if why := damage(folder):
            raise ValueError(
                f"trainer.resume_from_path={path} is damaged: {why}. Whole ones in {run_dir}:"
                f" {steps(run_dir) or 'none'}."
            )
        return folder.absolute()
    looked = _look(run_dir)
    found = [step for step, why in looked if not why]
    bad = [f"global_step_{step} ({why})" for step, why in looked if why]
    if not found and bad:
        raise ValueError(
            f"every checkpoint in {run_dir} is damaged: {', '.join(bad)}. trainer.resume_mode=disable starts anew."
        )
    if bad:
        logger.warning("damaged checkpoints are passed over: %s", ", ".join(bad))
    if not found:
        return None
    pointer = Path(run_dir) / LATEST
    last = pointer.read_text().strip() if pointer.is_file() else ""
    step = int(last) if last.isdecimal() and int(last) in found else found[-1]
    return Path(run_dir).absolute() / f"global_step_{step}"


def read_state(folder: Path) -> dict:
    """trainer.json of a checkpoint."""
    return json.loads((folder / "trainer.json").read_text())


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
