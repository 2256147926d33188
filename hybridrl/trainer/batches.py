"""One step's samples on their way through the passes: who gets which rows, and the columns that come back.

A pass (old log-probs, reference, values, an update) runs on a pool with mini-batches, epochs and a token budget. Passes
that agree on these share one packing, so that what one pass leaves on a rank is there for the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hybridrl.algorithms.aggregation import Denominators
from hybridrl.cluster.dispatch import Shares, WorkerGroup
from hybridrl.data.batching import Share, by_count, by_tokens, plan_shares
from hybridrl.data.trajectories import Trajectories, jagged

# What the ranks need of a sample; everything else stays with the driver.
RANK_COLUMNS = ("prompt_ids", "response_ids", "response_mask")


@dataclass(frozen=True)
class Pass:
    """A pool's name, the engine's role in it, and how the samples are cut for it."""

    pool: str
    role: str
    mini_batch_prompts: int
    epochs: int
    max_tokens: int
    max_tokens_key: str
    micro_batch_size: int | None = None  # samples; instead of the token budget
    shuffle_seed: int | None = None

    @property
    def share_name(self) -> str:
        """Equal for passes with the same packing on the same pool."""
        cut = f"{self.micro_batch_size} samples" if self.micro_batch_size else f"{self.max_tokens} tokens"
        return f"{self.mini_batch_prompts}x{self.epochs}/{cut}/{self.shuffle_seed}"

    def split(self) -> Callable:
        if self.micro_batch_size:
            return by_count(self.micro_batch_size)
        return by_tokens(self.max_tokens, self.max_tokens_key)


class StepBatches:
    """The step's batch (driver side) and its shares on the pools."""

    def __init__(
        self,
        batch: Trajectories,
        groups: dict[str, WorkerGroup],
        group_size: int,
        step: int,
        cost: Callable[[np.ndarray], np.ndarray],
        balance: bool,
        loss_scale_factor: float | None,
    ):
        self.batch, self.groups = batch, groups
        self.group_size, self.step, self.cost, self.balance, self.scale = (
            group_size,
            step,
            cost,
            balance,
            loss_scale_factor,
        )
        self.lengths = batch.lengths("prompt_ids") + batch.lengths("response_ids")
        self.offsets = np.concatenate([[0], np.cumsum(batch.lengths("response_ids"))])
        self.shares: dict[tuple[str, str], list[Share]] = {}
        self._held: dict[tuple[str, str], set[str]] = {}
        self._mask_replaced = False

    def load(self, p: Pass) -> list[Share]:
        """Sends the pass's shares to its pool unless they are there."""
        at = (p.pool, p.share_name)
        if at not in self.shares:
            seed = None if p.shuffle_seed is None else (p.shuffle_seed, self.step)
            shares = plan_shares(
                self.lengths,
                self.group_size,
                p.mini_batch_prompts,
                p.epochs,
                self.groups[p.pool].dp,
                self.cost,
                p.split(),
                self.balance,
                seed,
            )
            table = Trajectories(self.batch.table.select(list(RANK_COLUMNS)))
            payload = Shares((share, table.take(share.rows)) for share in shares)
            self.groups[p.pool].load_share(p.share_name, payload)
            self.shares[at], self._held[at] = shares, set()
        return self.shares[at]

    def compute(self, p: Pass, columns: dict[str, str]) -> None:
        """Runs a forward pass and adds its outputs to the batch; `columns`: the column's name -> the output's."""
        shares = self.load(p)
        parts = self.groups[p.pool].compute(p.share_name, p.role, columns)
        for column in columns:
            values = self._merge(shares, [part[column] for part in parts])
            self._held[(p.pool, p.share_name)].add(column)
            self.batch = self.batch.with_columns(**{column: jagged(values, self.offsets)})

    def replace_mask(self, mask: np.ndarray) -> None:
        """A new response_mask [R], which every pool gets before its next update."""
        self.batch = self.batch.with_columns(response_mask=jagged(mask.astype(np.int8), self.offsets))
        self._mask_replaced = True

    def update(self, p: Pass, loss, columns: list[str]) -> tuple[dict[str, float], np.ndarray]:
        """Optimizer steps; `columns` of the batch are sent along where the ranks don't have them.

        Returns the metrics (means over the optimizer steps) and the log-probs of the update's own forward, flat.
        """
        shares, at = self.load(p), (p.pool, p.share_name)
        columns = [*columns, "response_mask"] if self._mask_replaced else columns
        missing = [c for c in columns if c not in self._held[at]]
        if missing:
            self.groups[p.pool].attach(p.share_name, Shares(self._columns(share, missing) for share in shares))
            self._held[at].update(missing)
        results = self.groups[p.pool].update(p.share_name, p.role, loss, self._denominators(shares))
        sums = ("grad_norm", "lr", "skipped_steps")  # equal on all ranks; the rest are parts of a sum
        metrics = {}
        for name in results[0]["metrics"]:
            over_steps = np.array([r["metrics"][name] for r in results], dtype=np.float64)
            metrics[name] = float((over_steps[0] if name in sums else over_steps.sum(axis=0)).mean())
        return metrics, self._merge(shares, [r["logprobs"] for r in results])

    def _columns(self, share: Share, names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        out = {}
        for name in names:
            values, _ = self.batch.flat(name)
            flat = np.concatenate([values[self.offsets[r] : self.offsets[r + 1]] for r in share.rows])
            out[name] = flat, np.concatenate([[0], np.cumsum(np.diff(self.offsets)[share.rows])])
        return out

    def _merge(self, shares: list[Share], parts: list[np.ndarray]) -> np.ndarray:
        merged = np.zeros(self.offsets[-1], np.float32)
        for share, values in zip(shares, parts, strict=True):
            place = np.concatenate([np.arange(self.offsets[r], self.offsets[r + 1]) for r in share.rows])
            merged[place] = values
        return merged

    def _denominators(self, shares: list[Share]) -> list[list[Denominators]]:
        """Tokens and sequences that count, of each mini-batch over all data-parallel ranks."""
        mask, _ = self.batch.flat("response_mask")
        ends = np.concatenate([[0], np.cumsum(mask != 0)])
        counts = ends[self.offsets[1:]] - ends[self.offsets[:-1]]
        out = []
        for epoch in range(len(shares[0].epochs)):
            out.append([])
            for mini in range(len(shares[0].epochs[epoch])):
                rows = [s.rows[i] for s in shares for micro in s.epochs[epoch][mini] for i in micro]
                tokens, sequences = counts[rows].sum(), (counts[rows] > 0).sum()
                out[-1].append(Denominators(float(tokens), float(sequences), self.scale))
        return out

    def release(self) -> None:
        """Frees what the pools hold of this step."""
        for pool in {pool for pool, _ in self.shares}:
            self.groups[pool].drop_shares()
