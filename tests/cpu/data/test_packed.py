"""Packing against a naive loop over the rows."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from hybridrl.data.packed import pack
from hybridrl.data.trajectories import Trajectories


def random_trajectories(rng, n):
    prompts = [rng.integers(1, 50, rng.integers(1, 9)).tolist() for _ in range(n)]
    responses = [rng.integers(1, 50, rng.integers(0, 7)).tolist() for _ in range(n)]
    return Trajectories(pa.table({
        "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
        "response_ids": pa.array(responses, pa.list_(pa.int32())),
        "response_mask": pa.array([rng.integers(0, 2, len(r)).tolist() for r in responses], pa.list_(pa.int8())),
        "old_logprobs": pa.array([rng.normal(size=len(r)).tolist() for r in responses], pa.list_(pa.float32())),
    }))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_pack_equals_naive_loop(seed, multiple):
    t = random_trajectories(np.random.default_rng(seed), 6)
    ids, positions, cu, rows, targets, mask, cu_resp, old = [], [], [0], [], [], [], [0], []
    for row in t.table.to_pylist():
        start = len(ids)
        ids += row["prompt_ids"] + row["response_ids"]
        positions += range(len(ids) - start)
        cu.append(len(ids))
        for j, token in enumerate(row["response_ids"]):
            rows.append(start + len(row["prompt_ids"]) + j - 1)
            targets.append(token)
        mask += row["response_mask"]
        old += row["old_logprobs"]
        cu_resp.append(len(targets))
    pad = -len(ids) % multiple
    if pad:
        ids, positions = ids + [99] * pad, positions + list(range(pad))
        cu.append(len(ids))

    batch = pack(t, columns=("old_logprobs",), pad_multiple=multiple, pad_token_id=99)
    assert batch.input_ids.tolist() == ids and batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == cu and batch.max_seqlen == max(np.diff(cu))
    assert batch.response_rows.tolist() == rows and batch.targets.tolist() == targets
    assert batch.response_mask.tolist() == mask and batch.cu_resp.tolist() == cu_resp
    assert torch.equal(batch.columns["old_logprobs"], torch.tensor(old))
    assert batch.num_sequences == 6 and len(batch.input_ids) % multiple == 0
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.response_rows.dtype == torch.int64
    assert batch.cu_seqlens.dtype == batch.cu_resp.dtype == torch.int32
    assert batch.response_mask.dtype == torch.float32
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.columns["old_logprobs"].device.type == "meta"


def test_empty_prompt_is_refused_and_empty_response_has_no_rows():
    t = Trajectories(pa.table({"prompt_ids": [[1, 2]], "response_ids": pa.array([[]], pa.list_(pa.int32()))}))
    batch = pack(t)
    assert len(batch.targets) == 0 and batch.cu_resp.tolist() == [0, 0] and batch.cu_seqlens.tolist() == [0, 2]
    t = Trajectories(pa.table({"prompt_ids": [[1], []], "response_ids": [[3], [4]]}))
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        pack(t)


def test_column_of_other_lengths_is_refused_and_no_rows_is_empty():
    t = Trajectories(pa.table({"prompt_ids": [[1]], "response_ids": [[3, 4]], "values": [[1.0]]}))
    with pytest.raises(AssertionError, match="values"):
        pack(t, columns=("values",))
    empty = pack(t.take([]), pad_multiple=4)
    assert len(empty.input_ids) == 0 and empty.max_seqlen == 0 and empty.num_sequences == 0
