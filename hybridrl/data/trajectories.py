"""Trajectories: an Arrow table, one row a sample, that the phases of a step read and extend.

Lists are jagged, so nothing is padded to a maximum. A share for another process is made by `take`, never by slicing:
a pickled slice of an Arrow table carries the whole table along.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from hybridrl.data.files import read_table, write_table

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())

# Types of the columns that the trainer knows. Any other column passes through as it is.
COLUMN_TYPES: dict[str, pa.DataType] = {
    "uid": pa.string(),  # equal for the samples of one prompt: their group
    "sample": pa.int32(),  # 0 .. n-1 within the prompt
    "prompt_ids": _INTS,
    "response_ids": _INTS,
    "response_mask": pa.list_(pa.int8()),  # 1: a token that is trained on
    "rollout_logprobs": _FLOATS,
    "old_logprobs": _FLOATS,
    "ref_logprobs": _FLOATS,
    "values": _FLOATS,
    "token_rewards": _FLOATS,
    "advantages": _FLOATS,
    "returns": _FLOATS,
    "score": pa.float32(),
    "data_source": pa.string(),
    "ground_truth": pa.string(),
    "extra_info": pa.string(),  # JSON
    "finish_reason": pa.string(),
    "weight_version": pa.int32(),
}


def jagged(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """A list column of rows values[offsets[i]:offsets[i+1]].

    values [M] any numeric dtype, offsets [N+1] integers from 0 to M. The result may share memory with `values`.
    """
    values, offsets = np.ascontiguousarray(values), np.asarray(offsets)
    assert values.ndim == 1 and offsets.ndim == 1 and offsets[0] == 0 and offsets[-1] == len(values), (
        f"offsets {offsets[:1]}..{offsets[-1:]} do not cover {values.shape} values")
    assert len(values) < 2**31, "a list column holds fewer than 2**31 values"
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


class Trajectories:
    """Wraps `table`; immutable, each change makes a new object that shares the unchanged columns."""

    def __init__(self, table: pa.Table):
        for i, field in enumerate(table.schema):
            known = COLUMN_TYPES.get(field.name, field.type)
            if field.type != known:
                try:
                    table = table.set_column(i, field.name, table.column(i).cast(known))
                except pa.ArrowException as error:
                    raise ValueError(f"column {field.name!r} is {field.type}, expected {known}: {error}") from error
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self.table.column_names

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return self.table.column_names

    def take(self, indices: Iterable[int]) -> "Trajectories":
        """Rows `indices` (repeats allowed) in that order, as a copy that is one chunk and holds nothing else."""
        indices = pa.array(np.asarray(indices, dtype=np.int64))
        return Trajectories(self.table.combine_chunks().take(indices).combine_chunks())

    @classmethod
    def concat(cls, parts: list["Trajectories"]) -> "Trajectories":
        """All rows of `parts` in order. Every part must have the same columns (any order)."""
        assert parts, "nothing to concatenate"
        names = parts[0].columns
        for part in parts:
            assert set(part.columns) == set(names), f"columns differ: {sorted(set(part.columns) ^ set(names))}"
        return cls(pa.concat_tables([part.table.select(names) for part in parts]).combine_chunks())

    def scalars(self, name: str) -> np.ndarray:
        """A non-list column as NumPy, [N]: numeric dtype, or object for strings."""
        return self.table.column(name).to_numpy(zero_copy_only=False)

    def lengths(self, name: str) -> np.ndarray:
        """List lengths of a column, int64 [N]."""
        return np.diff(self._parts(name)[1])

    def flat(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list column as (values [M] in the column's dtype, offsets int64 [N+1] from 0).

        The values are a read-only view of the table where it is one chunk (sliced or not), else a copy.
        """
        views, offsets = self._parts(name)
        return (views[0] if len(views) == 1 else np.concatenate(views)), offsets

    def _parts(self, name: str) -> tuple[list[np.ndarray], np.ndarray]:
        column = self.table.column(name)
        assert pa.types.is_list(column.type), f"column {name!r} is {column.type}, not a list"
        if column.null_count:
            raise ValueError(f"column {name!r} has {column.null_count} missing rows")
        views, offsets, total = [], [np.zeros(1, np.int64)], 0
        for chunk in column.chunks:
            if len(chunk) == 0:
                continue
            # .values is the whole child array, whatever slice of it the chunk covers; .offsets follows the slice.
            bounds = chunk.offsets.to_numpy().astype(np.int64)
            child = chunk.values.slice(bounds[0], bounds[-1] - bounds[0])
            if child.null_count:
                raise ValueError(f"column {name!r} has missing values inside its lists")
            views.append(child.to_numpy())
            offsets.append(bounds[1:] - bounds[0] + total)
            total = offsets[-1][-1]
        if not views:
            views.append(np.zeros(0, column.type.value_type.to_pandas_dtype()))
        return views, np.concatenate(offsets)

    def with_columns(self, **columns) -> "Trajectories":
        """Add or replace columns. A value is an Arrow array (see `jagged`), a list, or a NumPy array [N]."""
        table = self.table
        for name, values in columns.items():
            if not isinstance(values, pa.Array | pa.ChunkedArray):
                values = pa.array(values, type=COLUMN_TYPES.get(name))
            assert len(values) == len(self), f"column {name!r} has {len(values)} rows, the table {len(self)}"
            place = table.schema.get_field_index(name)
            table = table.append_column(name, values) if place < 0 else table.set_column(place, name, values)
        return Trajectories(table)

    def write(self, path: str | Path) -> None:
        """Write as Parquet, whole or not at all."""
        write_table(self.table, path)

    @classmethod
    def read(cls, path: str | Path, key: str = "trajectories") -> "Trajectories":
        """Read what `write` wrote. ValueError names `key` when the file is missing or broken."""
        return cls(read_table(path, key))
