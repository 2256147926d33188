"""Reading and writing safetensors folders: slices, several files, and errors that name the file and the mend."""

import json

import pytest
import torch

from hybridrl.weights.huggingface import HfReader, shard_name, write_index, write_shard

TENSORS = {f"t{i}": torch.arange(12.0).reshape(4, 3) + 100 * i for i in range(4)}


def write(folder, parts: int) -> None:
    names = sorted(TENSORS)
    sizes = [write_shard(str(folder), {n: TENSORS[n] for n in names[i::parts]}, i, parts) for i in range(parts)]
    write_index(str(folder), sizes)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_written_is_read(tmp_path, parts):
    write(tmp_path, parts)
    reader = HfReader(str(tmp_path))
    for name, tensor in TENSORS.items():
        assert name in reader and reader.shape(name) == [4, 3]
        assert torch.equal(reader[name][:], tensor) and torch.equal(reader[name][1:3, 2:], tensor[1:3, 2:])
    assert "absent" not in reader
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (parts > 1)
    if parts > 1:
        found = json.loads(index.read_text())
        assert found["metadata"]["total_size"] == 4 * 12 * 4 and found["weight_map"].keys() == TENSORS.keys()
        assert all((tmp_path / file).is_file() for file in found["weight_map"].values())


def test_names_of_parts():
    assert shard_name(0, 1) == "model.safetensors" and shard_name(1, 12) == "model-00002-of-00012.safetensors"


def test_views_are_written_as_they_look(tmp_path):
    """Tensors that share memory or are transposed: safetensors refuses both as they are."""
    base = torch.arange(12.0).reshape(3, 4)
    write_shard(str(tmp_path), {"t": base.t()}, 0, 1)
    assert torch.equal(HfReader(str(tmp_path))["t"][:], base.t())


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json") as error:
        HfReader(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "Mend: point model.path" in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="Mend"):
        HfReader(str(tmp_path / "nowhere"))


def test_missing_part(tmp_path):
    write(tmp_path, 2)
    (tmp_path / shard_name(1, 2)).unlink()
    reader = HfReader(str(tmp_path))
    reader["t0"]
    with pytest.raises(ValueError, match="is missing although the index names it. Mend: copy the checkpoint") as error:
        reader["t1"]
    assert shard_name(1, 2) in str(error.value)


@pytest.mark.parametrize("parts", [1, 2])
def test_missing_tensor(tmp_path, parts):
    write(tmp_path, parts)
    with pytest.raises(ValueError, match="no tensor 'absent'") as error:
        HfReader(str(tmp_path))["absent"]
    assert str(tmp_path) in str(error.value)


def test_tensor_that_the_index_puts_in_the_wrong_part(tmp_path):
    write(tmp_path, 2)
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["t0"] = shard_name(1, 2)
    index.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="t0") as error:
        HfReader(str(tmp_path))["t0"]
    assert shard_name(1, 2) in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_file(tmp_path, damage):
    write(tmp_path, 1)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"version https://git-lfs"}[damage])
    with pytest.raises(ValueError, match="Mend") as error:
        HfReader(str(tmp_path))["t0"]
    assert str(path) in str(error.value)


def test_damaged_index(tmp_path):
    write(tmp_path, 2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:20])
    with pytest.raises(ValueError, match="Mend") as error:
        HfReader(str(tmp_path))
    assert str(index) in str(error.value)
