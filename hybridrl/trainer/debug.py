"""Training on the tables that an earlier run wrote (trainer.debug=train or replay)."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hybridrl.data.trajectories import Trajectories

# What the trainer computes anew from tokens and scores.
COMPUTED = ("old_logprobs", "ref_logprobs", "values", "token_rewards", "advantages", "returns")


def check_tables(folder: str, first: int, last: int, samples: int) -> None:
    """ValueError unless step_N.parquet of steps first to last are there with `samples` rows each."""
    for step in range(first, last + 1):
        path = Path(folder) / f"step_{step}.parquet"
        if not path.is_file():
            raise ValueError(
                f"trainer.rollout_data_dir={folder}: no {path.name} to train on; name the rollouts folder of a run that"
                f" has it, or set trainer.total_training_steps={step - 1}"
            )
        try:
            rows = pq.ParquetFile(path).metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"trainer.rollout_data_dir: {path} is not a whole Parquet file ({error})") from None
        if rows != samples:
            raise ValueError(
                f"trainer.rollout_data_dir: {path} has {rows} samples, and data.train_batch_size x rollout.n is"
                f" {samples}: set both as in the run that wrote it"
            )


def read(folder: str, step: int, scored: bool) -> Trajectories:
    """A step's samples as they were after the rollout; without scores unless `scored`."""
    table = Trajectories.read(Path(folder) / f"step_{step}.parquet").table
    dropped = COMPUTED if scored else (*COMPUTED, "response_text", "score", "acc")
    return Trajectories(table.drop_columns([name for name in dropped if name in table.column_names]))
