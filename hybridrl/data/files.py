"""Parquet in and out: whole files or none, and faults told in the user's terms."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(path: str | Path, key: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file. `key` is the configuration key or option that named it, for the message.

    Raises ValueError when the file is missing, a folder, truncated or not Parquet, or lacks one of `columns`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{key}: no such file: {path}. Correct the path, or write the file first "
                         "(python -m hybridrl.data.preprocess.gsm8k --local_dir ...).")
    if not path.is_file():
        raise ValueError(f"{key}: {path} is not a file. Name the Parquet files themselves, for example "
                         f"{path / 'train.parquet'}.")
    try:
        file = pq.ParquetFile(path)
        if columns is not None:
            names = file.schema_arrow.names
            missing = [name for name in columns if name not in names]
            if missing:
                raise ValueError(f"{key}: {path} has no column {missing[0]!r} (it has {', '.join(names)}).")
        return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, ValueError) and not isinstance(error, pa.ArrowException):
            raise
        raise ValueError(f"{key}: {path} cannot be read as Parquet (truncated or another format): {error}. "
                         "Write the file again.") from error


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write `table` as Parquet under a temporary name and rename it: readers see the old file or the new, whole."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
