"""Validation: greedy (or sampled) answers to held-out prompts, scored; verl's val-core metrics and the samples."""

import numpy as np
import pyarrow as pa

from hybridrl.data.prompts import PromptDataset
from hybridrl.rewards.manager import RewardManager
from hybridrl.rollout.fleet import RolloutFleet
from hybridrl.rollout.sampling import SamplingSettings
from hybridrl.telemetry.metrics import validation_metrics
from hybridrl.trainer.samples import join, repeat, score


class Validator:
    """Holds the prompts; `run` asks the fleet."""

    def __init__(self, dataset: PromptDataset, tokenizer, rewards: RewardManager, sampling: SamplingSettings, n: int):
        self.dataset, self.tokenizer, self.rewards, self.sampling, self.n = dataset, tokenizer, rewards, sampling, n

    def run(self, fleet: RolloutFleet, step: int) -> tuple[dict[str, float], pa.Table]:
        """(metrics, one row a sample: prompt, response, ground_truth, data_source, score, acc)."""
        prompts = self.dataset.table
        requests = repeat(prompts, [f"val-{i}" for i in range(prompts.num_rows)], self.n)
        batch, failed = score(
            join(requests, fleet.generate(requests, self.sampling, step)), self.tokenizer, self.rewards
        )
        scores = batch.scalars("score").astype(np.float64)
        accuracy = batch.scalars("acc").astype(np.float64) if "acc" in batch else np.full(len(batch), np.nan)
        found = validation_metrics(
            batch.table["uid"].to_pylist(), batch.table["data_source"].to_pylist(), {"reward": scores, "acc": accuracy}
        )
        samples = pa.table(
            {
                "prompt": batch.table["prompt_text"],
                "response": batch.table["response_text"],
                "ground_truth": batch.table["ground_truth"],
                "data_source": batch.table["data_source"],
                "score": scores,
                "acc": accuracy,
            }
        )
        return found | {f"val-aux/{name}": value for name, value in failed.items()}, samples
