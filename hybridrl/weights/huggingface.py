"""Hugging Face checkpoints: slices of safetensors shards in, a folder that transformers and vLLM load out."""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# What a checkpoint needs beside its weights; copied from the folder that training began with.
SIDE_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")


class HfReader:
    """Lazily opened safetensors of a folder. `reader[name]` is a slice of the file: only what is indexed is read."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{index} is damaged ({error!r}). Mend: copy the checkpoint again.") from None
        else:
            single = self.folder / "model.safetensors"
            if not single.is_file():
                raise ValueError(
                    f"{folder} has neither model.safetensors nor model.safetensors.index.json. "
                    "Mend: point model.path at a Hugging Face folder with safetensors weights."
                )
            self._file_of = dict.fromkeys(_opened(single).keys(), single.name)
        self._open: dict[str, object] = {}

    def __iter__(self):
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str):
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name!r}: it is incomplete or of another architecture.")
        file = self._file_of[name]
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path} is missing although the index names it. Mend: copy the checkpoint again.")
            self._open[file] = _opened(path)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError:
            path = self.folder / file
            raise ValueError(f"{path} lacks {name!r}, which the index puts there. Mend: copy it again.") from None

    def shape(self, name: str) -> list[int]:
        return self[name].get_shape()


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Mend: copy the checkpoint again.") from None


def write_shard(folder: str, tensors: dict[str, Tensor], part: int, parts: int) -> dict[str, int]:
    """Writes one of `parts` files of a checkpoint; returns the bytes of each of its tensors."""
    name = shard_name(part, parts)
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, name), metadata={"format": "pt"})
    return {k: v.numel() * v.element_size() for k, v in tensors.items()}


def shard_name(part: int, parts: int) -> str:
    return "model.safetensors" if parts == 1 else f"model-{part + 1:05d}-of-{parts:05d}.safetensors"


def write_index(folder: str, sizes: list[dict[str, int]]) -> None:
    """The index of a checkpoint in several files; `sizes` is what each file's `write_shard` returned, in order."""
    if len(sizes) == 1:
        return
    weight_map = {k: shard_name(i, len(sizes)) for i, part in enumerate(sizes) for k in part}
    total = sum(n for part in sizes for n in part.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    Path(folder, "model.safetensors.index.json").write_text(text + "\n")


def copy_side_files(source: str, target: str, dtype: str, tokenizer: str | None = None) -> None:
    """config.json (with the dtype of the written weights) and the tokenizer's files."""
    config = json.loads(Path(source, "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    Path(target, "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for folder in (tokenizer or source, source):
        for path in Path(folder).iterdir():
            if path.is_file() and path.name.startswith(SIDE_FILES) and not Path(target, path.name).exists():
                shutil.copy(path, target)
