"""Trajectories: take, concat, flat views of sliced and chunked tables, Parquet round trip and faults."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from hybridrl.data.trajectories import Trajectories, jagged


def make(n=5, start=0):
    ids = [list(range(start + i, start + i + i % 3)) for i in range(n)]
    return Trajectories(pa.table({
        "uid": [f"u{start + i}" for i in range(n)],
        "prompt_ids": [[start + i] * (i + 1) for i in range(n)],
        "response_ids": pa.array(ids, pa.list_(pa.int64())),
        "score": [float(i) for i in range(n)],
        "mine": list(range(n)),
    }))


def test_known_columns_get_their_types_and_unknown_pass_through():
    t = make()
    assert t.table.schema.field("response_ids").type == pa.list_(pa.int32())
    assert t.table.schema.field("score").type == pa.float32()
    assert t.table.schema.field("mine").type == pa.int64()
    with pytest.raises(ValueError, match="uid"):
        Trajectories(pa.table({"uid": [[1]]}))


def test_flat_of_slices_and_chunks_equals_plain_lists():
    t = make(7)
    sliced = Trajectories(t.table.slice(2, 4))
    chunked = Trajectories(pa.concat_tables([t.table.slice(1, 2), t.table.slice(0, 0), t.table.slice(4, 3)]))
    for case in (t, sliced, chunked, t.take([]), Trajectories(t.table.schema.empty_table())):
        for name in ("prompt_ids", "response_ids"):
            rows = case.table.column(name).to_pylist()
            values, offsets = case.flat(name)
            assert values.dtype == np.int32 and offsets.dtype == np.int64
            assert values.tolist() == sum(rows, [])
            assert [values[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)] == rows
            assert case.lengths(name).tolist() == [len(r) for r in rows]


def test_flat_is_zero_copy_for_one_chunk():
    t = make().take([0, 1, 2, 3, 4])
    values, _ = t.flat("prompt_ids")
    address = t.table.column("prompt_ids").chunk(0).values.buffers()[1].address
    assert values.ctypes.data == address


def test_take_orders_repeats_and_carries_nothing_else():
    big = Trajectories.concat([make(5, start=10 * i) for i in range(200)])
    part = big.take(np.array([999, 3, 3]))
    assert part.scalars("uid").tolist() == ["u1994", "u3", "u3"]
    assert part.table.column("uid").num_chunks == 1
    assert len(pickle.dumps(part.table)) < len(pickle.dumps(big.table)) / 20


def test_concat_accepts_another_column_order_and_refuses_other_columns():
    a, b = make(2), make(2, start=5)
    b = Trajectories(b.table.select(b.columns[::-1]))
    assert Trajectories.concat([a, b]).scalars("uid").tolist() == ["u0", "u1", "u5", "u6"]
    with pytest.raises(AssertionError, match="extra"):
        Trajectories.concat([a, a.with_columns(extra=[1, 2])])


def test_with_columns_adds_and_replaces():
    t = make(3)
    _, offsets = t.flat("response_ids")
    new = t.with_columns(values=jagged(np.arange(offsets[-1], dtype=np.float64), offsets),
                         score=np.array([1, 2, np.nan]), weight_version=[1, 1, 1])
    assert new.table.schema.field("values").type == pa.list_(pa.float32())
    assert new.table.schema.field("weight_version").type == pa.int32()
    assert new.scalars("score")[:2].tolist() == [1, 2] and np.isnan(new.scalars("score")[2])
    assert t.scalars("score").tolist() == [0, 1, 2], "the original is unchanged"
    with pytest.raises(AssertionError, match="rows"):
        t.with_columns(score=[1.0])


def test_missing_values_are_refused():
    t = Trajectories(pa.table({"prompt_ids": pa.array([[1], None], pa.list_(pa.int32()))}))
    with pytest.raises(ValueError, match="prompt_ids"):
        t.lengths("prompt_ids")
    t = Trajectories(pa.table({"prompt_ids": pa.array([[1, None]], pa.list_(pa.int32()))}))
    with pytest.raises(ValueError, match="prompt_ids"):
        t.flat("prompt_ids")


def test_parquet_round_trip_and_faults(tmp_path):
    t = make(6)
    path = tmp_path / "rollouts" / "step_1.parquet"
    t.write(path)
    assert Trajectories.read(path).table.equals(t.table)
    assert [p.name for p in path.parent.iterdir()] == ["step_1.parquet"]
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="trainer.replay.*truncated"):
        Trajectories.read(path, "trainer.replay")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="truncated"):
        Trajectories.read(path)
    with pytest.raises(ValueError, match="no such file"):
        Trajectories.read(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="not a file"):
        Trajectories.read(tmp_path)
