"""Prompts for a run: Parquet files in verl's schema, rendered, tokenised and length-checked once, drawn in batches.

The whole data set is one Arrow table in memory. `PromptLoader` draws from it and can resume at the exact prompt.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from hybridrl.data.files import read_table

logger = logging.getLogger(__name__)

TRUNCATION = ("error", "left", "right", "middle")

SCHEMA = pa.schema({
    "prompt_ids": pa.list_(pa.int32()),
    "data_source": pa.string(),
    "ground_truth": pa.string(),
    "extra_info": pa.string(),  # JSON
    "index": pa.int64(),  # row number over all files, before filtering
    "prompt_text": pa.string(),  # the rendered prompt, before truncation
})


def truncate(ids: list[int], max_length: int, truncation: str) -> list[int]:
    """Cut `ids` to `max_length`: "left" drops the beginning, "right" the end, "middle" keeps both ends."""
    if len(ids) <= max_length:
        return ids
    if truncation == "left":
        return ids[len(ids) - max_length:]
    if truncation == "right":
        return ids[:max_length]
    assert truncation == "middle", truncation
    head = max_length // 2
    return ids[:head] + ids[len(ids) - (max_length - head):]


class PromptDataset:
    """Rows of `files` in order, as `.table` with the columns of SCHEMA.

    files: Parquet files with `prompt_key` (a list of {role, content} messages, or a plain string), `reward_fn_key`
    (the data source that routes the reward), `reward_model` with `ground_truth`, and optionally `extra_info`.
    max_samples: keep the first so many rows, -1 all. filter_overlong_prompts drops prompts longer than
    max_prompt_length tokens; otherwise `truncation` cuts them, or refuses ("error").
    ValueError, naming `key_prefix` and the mend: missing or broken file, missing column, wrong type, empty prompt, no
    chat template, too long a prompt, nothing left.
    """

    def __init__(self, files: list[str], tokenizer, max_prompt_length: int, truncation: str = "error",
                 filter_overlong_prompts: bool = False, prompt_key: str = "prompt",
                 reward_fn_key: str = "data_source", max_samples: int = -1,
                 apply_chat_template_kwargs: dict | None = None, key_prefix: str = "data.train_files"):
        if truncation not in TRUNCATION:
            raise ValueError(f"data.truncation={truncation!r}: one of {', '.join(TRUNCATION)}")
        if max_prompt_length < 1:
            raise ValueError(f"data.max_prompt_length={max_prompt_length}: at least 1")
        self.tokenizer, self.key, self.prompt_key, self.reward_fn_key = tokenizer, key_prefix, prompt_key, reward_fn_key
        self.template_kwargs = dict(apply_chat_template_kwargs or {})
        files = [files] if isinstance(files, str | Path) else list(files)
        if not files:
            raise ValueError(f"{key_prefix} is empty: name at least one Parquet file")
        tables, start = [], 0
        for path in files:
            table = self._read(path, start)
            start += table.num_rows
            tables.append(table)
        table = pa.concat_tables(tables)
        if 0 <= max_samples < table.num_rows:
            table = table.slice(0, max_samples)
        self.table = self._limit(self._tokenize(table), max_prompt_length, truncation, filter_overlong_prompts)
        if len(self) == 0:
            raise ValueError(f"{key_prefix}: no prompt is left of {start} in {', '.join(map(str, files))}: raise "
                             f"data.max_prompt_length={max_prompt_length}, or give other files")

    def __len__(self) -> int:
        return self.table.num_rows

    def take(self, indices: Iterable[int]) -> pa.Table:
        """Rows `indices` in that order, as a table that holds nothing else."""
        return self.table.take(pa.array(np.asarray(indices, np.int64))).combine_chunks()

    def _read(self, path: str, start: int) -> pa.Table:
        """One file as SCHEMA's columns, without prompt_ids yet; `start` rows came before."""
        raw = read_table(path, self.key)
        self._check(raw, path)
        rewards = raw.column("reward_model").to_pylist()
        missing = next((i for i, r in enumerate(rewards) if r is None or r.get("ground_truth") is None), None)
        if missing is not None:
            raise ValueError(f"{self.key}: {path} row {missing}: reward_model.ground_truth is missing. Write the row "
                             "again with the answer as a string.")
        infos = raw.column("extra_info").to_pylist() if "extra_info" in raw.column_names else [{}] * raw.num_rows
        truths = [r["ground_truth"] for r in rewards]
        return pa.table({
            "data_source": raw.column(self.reward_fn_key).cast(pa.string()),
            "ground_truth": [t if isinstance(t, str) else json.dumps(t, default=str) for t in truths],
            "extra_info": [i if isinstance(i, str) else json.dumps(i or {}, default=str) for i in infos],
            "index": np.arange(start, start + raw.num_rows, dtype=np.int64),
            "prompt_text": pa.array([self._render(p, path, i) for i, p in
                                     enumerate(raw.column(self.prompt_key).to_pylist())], pa.string()),
        }, schema=pa.schema([f for f in SCHEMA if f.name != "prompt_ids"]))

    def _check(self, raw: pa.Table, path: str) -> None:
        hints = {self.prompt_key: "data.prompt_key names the column of prompts",
                 self.reward_fn_key: "data.reward_fn_key names the column that says which reward applies",
                 "reward_model": "it holds {style, ground_truth}"}
        for name, hint in hints.items():
            if name not in raw.column_names:
                raise ValueError(f"{self.key}: {path} has no column {name!r} (it has {', '.join(raw.column_names)}); "
                                 f"{hint}.")
        kind = raw.schema.field(self.prompt_key).type
        messages = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if messages:
            item = kind.value_type
            messages = pa.types.is_struct(item) and {"role", "content"} <= {f.name for f in item}
        if not messages and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{self.key}: {path} column {self.prompt_key!r} is {kind}; it must be a list of "
                             "{role, content} messages or a string (data.prompt_key chooses the column).")
        if messages and getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(f"{self.key}: {path} has chat messages, but the tokenizer of actor_rollout_ref.model.path "
                             "has no chat template: use a model with one (chat_template in tokenizer_config.json), or "
                             "give prompts as plain strings.")
        if not pa.types.is_string(source := raw.schema.field(self.reward_fn_key).type) and \
                not pa.types.is_large_string(source):
            raise ValueError(f"{self.key}: {path} column {self.reward_fn_key!r} is {source}, not a string "
                             "(data.reward_fn_key chooses the column).")
        if not pa.types.is_struct(reward := raw.schema.field("reward_model").type):
            raise ValueError(f"{self.key}: {path} column 'reward_model' is {reward}; it must be a struct with "
                             "ground_truth.")

    def _render(self, prompt, path: str, row: int) -> str:
        if not prompt:
            raise ValueError(f"{self.key}: {path} row {row}: the prompt is empty. Remove the row.")
        if isinstance(prompt, str):
            return prompt
        kwargs = {"add_generation_prompt": True, **self.template_kwargs}
        try:
            return self.tokenizer.apply_chat_template(prompt, tokenize=False, **kwargs)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise ValueError(f"{self.key}: {path} row {row}: the chat template refuses the messages: {error}. Correct "
                             "the row, or data.apply_chat_template_kwargs.") from error

    def _tokenize(self, table: pa.Table) -> pa.Table:
        texts = table.column("prompt_text").to_pylist()
        # A rendered chat template already holds its special tokens.
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return table.add_column(0, SCHEMA.field("prompt_ids"), pa.array(ids, SCHEMA.field("prompt_ids").type))

    def _limit(self, table: pa.Table, limit: int, truncation: str, drop: bool) -> pa.Table:
        """Apply the length limit; drop also rows whose tokens are none at all, which cannot be generated from."""
        ids = table.column("prompt_ids").to_pylist()
        empty = next((i for i, x in enumerate(ids) if not x), None)
        if empty is not None:
            raise ValueError(f"{self.key}: row {table.column('index')[empty]} gives no tokens. Remove the row.")
        long = [i for i, x in enumerate(ids) if len(x) > limit]
        if not long:
            return table.combine_chunks()
        if drop:
            logger.info("%s: dropped %d of %d prompts longer than data.max_prompt_length=%d", self.key, len(long),
                        len(ids), limit)
            keep = np.setdiff1d(np.arange(len(ids)), long)
            return table.take(pa.array(keep)).combine_chunks()
        if truncation == "error":
            worst = max(long, key=lambda i: len(ids[i]))
            raise ValueError(
                f"{self.key}: {len(long)} of {len(ids)} prompts are longer than data.max_prompt_length={limit} (row "
                f"{table.column('index')[worst]} has {len(ids[worst])} tokens): raise it, drop them by "
                "data.filter_overlong_prompts=True, or cut them by data.truncation=left, right or middle.")
        cut = pa.array([truncate(x, limit, truncation) for x in ids], SCHEMA.field("prompt_ids").type)
        return table.set_column(0, SCHEMA.field("prompt_ids"), cut).combine_chunks()


class PromptLoader:
    """Batches of a PromptDataset: each epoch its own permutation, made from (seed, epoch); the rest dropped."""

    def __init__(self, dataset: PromptDataset, batch_size: int, shuffle: bool = True, seed: int = 0):
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(f"data.train_batch_size={batch_size} must lie between 1 and the {len(dataset)} prompts of "
                             f"{dataset.key}: lower it or give more prompts")
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.epoch, self.batch = 0, 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self.dataset) // self.batch_size

    def next(self) -> tuple[pa.Table, int]:
        """The next batch (batch_size rows with SCHEMA's columns) and the epoch, from 0, that it belongs to."""
        if self.batch == self.steps_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        epoch, start = self.epoch, self.batch * self.batch_size
        rows = self._permutation(epoch)[start:start + self.batch_size]
        self.batch += 1
        return self.dataset.take(rows), epoch

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            n = len(self.dataset)
            rows = np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)
            self._order = (epoch, rows)
        return self._order[1]

    def _identity(self) -> dict:
        """What must be unchanged for a position to mean the same prompts."""
        digest = hashlib.sha256()
        for row in self.dataset.table.column("prompt_text").to_pylist():
            digest.update(row.encode() + b"\0")
        return {"data.train_batch_size": self.batch_size, "data.shuffle": self.shuffle, "data.seed": self.seed,
                self.dataset.key: digest.hexdigest()}

    def state_dict(self) -> dict:
        """The position as JSON-ready values: `load_state_dict` of it makes `next` go on with the very next batch."""
        return {"epoch": self.epoch, "batch": self.batch, "identity": self._identity()}

    def load_state_dict(self, state: dict) -> None:
        """Take up a saved position. ValueError names the key that was changed since and would change the order."""
        for key, value in self._identity().items():
            if state["identity"].get(key) != value:
                raise ValueError(f"{key} differs from the checkpointed run's ({state['identity'].get(key)} then, "
                                 f"{value} now), so its data position means nothing: restore it, or start afresh by "
                                 "trainer.resume_mode=disable")
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
