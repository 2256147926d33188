"""What the data-preparation scripts share: one row of verl's schema, finding the raw rows, and writing the files."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from hybridrl.data.files import read_table, write_table


def row(data_source: str, prompt: str, ground_truth: str, *, ability: str, split: str, index: int, question: str,
        answer: str) -> dict:
    """One training or test row. `prompt` is the user's message; `question` and `answer` are the raw problem's."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def write_rows(rows: list[dict], path: Path) -> None:
    """Write rows as Parquet, whole or not at all, and say so."""
    write_table(pa.Table.from_pylist(rows), path)
    print(f"{path}: {len(rows)} rows")


def arguments(doc: str, default_dir: str) -> argparse.Namespace:
    """Options of a script that converts a public data set: local_dir (Path) and source (Path or None)."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--local_dir", "--local_save_dir", type=Path, default=Path(default_dir),
                        help="folder to write train.parquet and test.parquet into (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of raw files, instead of downloading from Hugging Face")
    args = parser.parse_args()
    args.local_dir = args.local_dir.expanduser()
    return args


def raw_rows(source: Path | None, split: str, hub: tuple[str, ...], fields: tuple[str, ...]) -> list[dict]:
    """The raw rows of a split: from `source`/<split>.jsonl, .json or .parquet, else from the hub's `hub` data set.

    ValueError when a file or one of `fields` is missing, a line is no JSON, or the hub cannot be reached.
    """
    rows = _from_hub(hub, split) if source is None else _from_folder(source.expanduser(), split)
    origin = f"data set {hub[0]} split {split}" if source is None else f"--source {source}: {split}"
    if not rows:
        raise ValueError(f"{origin} is empty")
    for index, item in enumerate(rows):
        for name in fields:
            if not isinstance(item, dict) or not isinstance(item.get(name), str):
                raise ValueError(f"{origin} row {index} has no text in field {name!r}; each row needs "
                                 f"{' and '.join(fields)}")
    return rows


def _from_folder(folder: Path, split: str) -> list[dict]:
    if not folder.is_dir():
        raise ValueError(f"--source {folder} is no folder")
    tries = [folder / f"{split}{ending}" for ending in (".jsonl", ".json", ".parquet")]
    path = next((p for p in tries if p.is_file()), None)
    if path is None:
        raise ValueError(f"--source {folder} lacks the split {split!r}: put {tries[0].name} or {tries[2].name} there "
                         f"(found: {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'})")
    if path.suffix == ".parquet":
        return read_table(path, "--source").to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _json(text, path, 1)
    return [_json(line, path, n) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _json(text: str, path: Path, line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--source: {path} line {line} is not JSON: {error}") from error


def _from_hub(hub: tuple[str, ...], split: str) -> list[dict]:
    import datasets  # seconds to import, and not needed with --source

    try:
        return datasets.load_dataset(*hub, split=split).to_list()
    except Exception as error:  # the hub's client raises many kinds for one fact: no data came
        raise ValueError(f"could not load {hub[0]} from Hugging Face ({type(error).__name__}: {error}). Without "
                         "network, download the raw files elsewhere and pass their folder by --source.") from error


def convert(args: argparse.Namespace, read: Callable[[str], list[dict]], make: Callable[[dict, str, int], dict],
            splits: Iterable[str] = ("train", "test")) -> None:
    """Make every split before writing any: a fault in the last one leaves the folder as it was."""
    made = {split: [make(item, split, i) for i, item in enumerate(read(split))] for split in splits}
    for split, rows in made.items():
        write_rows(rows, args.local_dir / f"{split}.parquet")


def run(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake ends in one line, not in a traceback."""
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
