"""From prompts to scored samples, the same for training and validation."""

import numpy as np
import pyarrow as pa

from hybridrl.data.trajectories import Trajectories, jagged
from hybridrl.rewards.manager import RewardManager


def repeat(prompts: pa.Table, uids: list[str], n: int) -> pa.Table:
    """Each prompt n times in a row, with uid and sample number."""
    rows = np.repeat(np.arange(prompts.num_rows), n)
    out = prompts.take(pa.array(rows))
    out = out.append_column("uid", pa.array([uids[r] for r in rows]))
    return out.append_column("sample", pa.array(np.tile(np.arange(n, dtype=np.int32), prompts.num_rows)))


def join(requests: pa.Table, responses: pa.Table) -> Trajectories:
    """Requests with their responses beside them (same order), and a mask of ones."""
    assert requests["uid"].to_pylist() == responses["uid"].to_pylist()
    table = requests
    for name in ("response_ids", "rollout_logprobs", "finish_reason", "weight_version"):
        table = table.append_column(name, responses[name])
    batch = Trajectories(table.combine_chunks())
    values, offsets = batch.flat("response_ids")
    return batch.with_columns(response_mask=jagged(np.ones(len(values), np.int8), offsets))


def score(batch: Trajectories, tokenizer, rewards: RewardManager) -> tuple[Trajectories, dict[str, float]]:
    """Adds response text, score and the reward function's numeric extras."""
    texts = tokenizer.batch_decode(batch.table["response_ids"].to_pylist(), skip_special_tokens=True)
    columns = {c: batch.table[c].to_pylist() for c in ("data_source", "ground_truth", "extra_info")}
    result = rewards.score(columns["data_source"], texts, columns["ground_truth"], columns["extra_info"])
    batch = batch.with_columns(response_text=texts, score=result.scores, **result.extras)
    return batch, dict(result.metrics)
