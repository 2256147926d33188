"""What can be known to fail before any worker starts: model folders, tokenizer, data files, the output folder.

Reads configuration files and Parquet footers only: no weights, no CUDA, no Ray. Writes nothing that stays.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridrl.algorithms import by_path
from hybridrl.config import ConfigError, SFTConfig
from hybridrl.resolution import Resolved, ResolvedSFT, Role

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CPU_HEAD_DIM = 32  # vLLM's attention on CPU refuses smaller heads


def check_inputs(resolved: Resolved | ResolvedSFT) -> None:
    """ConfigError with everything that is wrong with the files a run reads and the folder it writes to."""
    config = resolved.config
    if isinstance(config, SFTConfig):
        problems = [*_model("model", config.model.path, config.model.trust_remote_code, resolved.actor, "megatron")]
        problems += _tokenizer("model", config.model.tokenizer_path, config.model.path, config.model.trust_remote_code)
        columns = ("prompt_key", "response_key")
    else:
        problems = [*_ppo_models(resolved), *_ppo_files(config)]
        columns = ("prompt_key", "reward_fn_key")
    files = [*_files("data.train_files", config.data.train_files), *_files("data.val_files", config.data.val_files)]
    problems += files or _columns(config, columns)
    problems += _writable("trainer.default_local_dir", config.trainer.default_local_dir)
    if problems:
        raise ConfigError(*problems)


def _ppo_models(resolved: Resolved) -> Iterator[str]:
    arr, critic = resolved.config.actor_rollout_ref, resolved.config.critic
    name, model = "actor_rollout_ref.model", arr.model
    problems = list(
        _model(name, model.path, model.trust_remote_code, resolved.actor, "actor_rollout_ref.actor.megatron")
    )
    yield from problems
    if not problems:
        hf = _hf_config(model.path, model.trust_remote_code)
        yield from _engine(resolved, hf)
        if resolved.ref and not resolved.ref.colocated:
            yield from _divides(name, hf, resolved.ref, "actor_rollout_ref.ref.megatron")
    yield from _tokenizer(name, model.tokenizer_path, model.path, model.trust_remote_code)
    if resolved.critic and (critic.model.path != model.path or not resolved.critic.colocated):
        own = list(
            _model(
                "critic.model", critic.model.path, critic.model.trust_remote_code, resolved.critic, "critic.megatron"
            )
        )
        yield from own
        if not own and not problems:
            yield from _same_vocabulary(resolved)


def _model(name: str, path: str, trust: bool, role: Role, megatron: str) -> Iterator[str]:
    """A Hugging Face folder that hybridrl can train: present, whole, of a known family, and divisible as asked."""
    folder = Path(path)
    if not folder.is_dir():
        fetch = (
            f"; fetch it with `hf download {path} --local-dir FOLDER` and give FOLDER" if path.count("/") == 1 else ""
        )
        yield f"{name}.path={path}: there is no such folder{fetch}"
        return
    if not (folder / "config.json").is_file():
        yield f"{name}.path={path}: no config.json in it; give a Hugging Face model folder"
        return
    yield from _weights(name, folder)
    try:
        hf = _hf_config(path, trust)
    except Exception as error:  # transformers raises many kinds for a config.json it cannot read
        yield f"{name}.path={path}: config.json cannot be read: {_first_line(error)}"
        return
    from hybridrl.megatron.families import family_of

    try:
        family_of(hf)
    except ValueError as error:
        yield str(error).replace("actor_rollout_ref.model", name)
        return
    yield from _divides(name, hf, role, megatron)


def _hf_config(path: str, trust: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=trust, local_files_only=True)


def _weights(name: str, folder: Path) -> Iterator[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            mend = (
                "convert them with save_pretrained(..., safe_serialization=True)"
                if list(folder.glob("*.bin"))
                else ("copy the weights there")
            )
            yield f"{name}.path={folder}: no model.safetensors and no model.safetensors.index.json in it; {mend}"
        return
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        yield f"{name}.path={folder}: {index.name} cannot be read ({_first_line(error)}); copy the checkpoint again"
        return
    if missing := sorted(file for file in files if not (folder / file).is_file()):
        yield (
            f"{name}.path={folder}: {len(missing)} weight files are missing, such as {missing[0]}; copy the checkpoint"
            " again"
        )


def _divides(name: str, hf: Any, role: Role, megatron: str) -> Iterator[str]:
    tp, pp = f"{megatron}.tensor_model_parallel_size={role.tp}", f"{megatron}.pipeline_model_parallel_size={role.pp}"
    for what, field in (
        ("attention heads", "num_attention_heads"),
        ("key/value heads", "num_key_value_heads"),
        ("feed-forward units", "intermediate_size"),
    ):
        size = getattr(hf, field)
        if size % role.tp:
            yield f"{tp} does not divide the {size} {what} of {name}.path; choose a divisor"
    if hf.num_hidden_layers % (role.pp * role.vpp):
        virtual = f" x {megatron}.virtual_pipeline_model_parallel_size={role.vpp}" if role.vpp > 1 else ""
        yield f"{pp}{virtual} does not divide the {hf.num_hidden_layers} layers of {name}.path; choose a divisor"


def _engine(resolved: Resolved, hf: Any) -> Iterator[str]:
    """What vLLM would refuse after minutes."""
    from hybridrl.megatron.families import head_dim

    rollout, key = resolved.config.actor_rollout_ref.rollout, "actor_rollout_ref.rollout"
    if resolved.machine.device == "cpu" and head_dim(hf) < CPU_HEAD_DIM:
        yield (
            f"actor_rollout_ref.model.path: its heads have {head_dim(hf)} dimensions and vLLM on CPU takes"
            f" {CPU_HEAD_DIM} or more; use a model with wider heads"
        )
    if hf.num_attention_heads % resolved.rollout.tp:
        yield (
            f"{key}.tensor_model_parallel_size={resolved.rollout.tp} does not divide the {hf.num_attention_heads}"
            " attention heads of actor_rollout_ref.model.path; choose a divisor"
        )
    if rollout.max_model_len > hf.max_position_embeddings:
        what = (
            f"{key}.max_model_len"
            if f"{key}.max_model_len" in resolved.config.explicit
            else ("data.max_prompt_length + data.max_response_length")
        )
        yield (
            f"{what} = {rollout.max_model_len}: the model has {hf.max_position_embeddings} positions "
            "(max_position_embeddings in its config.json); lower it"
        )


def _same_vocabulary(resolved: Resolved) -> Iterator[str]:
    model, critic = resolved.config.actor_rollout_ref.model, resolved.config.critic.model
    ours, theirs = _hf_config(model.path, model.trust_remote_code), _hf_config(critic.path, critic.trust_remote_code)
    if theirs.vocab_size < ours.vocab_size:
        yield (
            f"critic.model.path={critic.path} has a vocabulary of {theirs.vocab_size} and the actor's tokens go up to "
            f"{ours.vocab_size}; use a critic of the same model family"
        )


def _tokenizer(name: str, path: str, model_path: str, trust: bool) -> Iterator[str]:
    if not Path(path).is_dir():
        if path != model_path:  # else the model's own line says it
            yield f"{name}.tokenizer_path={path}: there is no such folder"
        return
    key = f"{name}.path" if path == model_path else f"{name}.tokenizer_path"
    from transformers import AutoTokenizer

    if not any((Path(path) / file).is_file() for file in VOCABULARIES):
        # transformers would make an empty tokenizer of the family's class and say nothing
        yield f"{key}={path}: no tokenizer in it ({' or '.join(VOCABULARIES)}); copy the tokenizer's files there"
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # as many kinds as there are tokenizer formats
        yield (
            f"{key}={path}: no tokenizer can be loaded from it ({_first_line(error)}); copy the tokenizer's files there"
        )
        return
    if tokenizer.eos_token_id is None:
        yield f"{key}={path}: the tokenizer has no end-of-sequence token, so no response could end; set eos_token"
    config = Path(model_path) / "config.json"
    try:
        vocabulary = json.loads(config.read_text()).get("vocab_size")
    except (OSError, ValueError):
        return
    if vocabulary is not None and len(tokenizer) > vocabulary:
        yield (
            f"{key}={path}: the tokenizer has {len(tokenizer)} tokens and the model's vocab_size is {vocabulary}; "
            "they do not belong together"
        )


def _files(key: str, files: list[str]) -> Iterator[str]:
    """Missing, foreign and truncated files; the rows are PromptDataset's to check."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        path = Path(file)
        if path.is_dir():
            yield f"{key}: {file} is a folder; name the Parquet files in it"
        elif not path.is_file():
            yield f"{key}: {file} does not exist; hybridrl.data.preprocess makes such files"
        elif not os.access(path, os.R_OK):
            yield f"{key}: {file} may not be read by this user"
        else:
            try:
                rows = pq.ParquetFile(path).metadata.num_rows
            except (pa.ArrowException, OSError) as error:
                yield f"{key}: {file} is not a whole Parquet file ({_first_line(error)}); write it again"
                continue
            if rows == 0:
                yield f"{key}: {file} has no rows"


def _columns(config: Any, keys: tuple[str, ...]) -> Iterator[str]:
    import pyarrow.parquet as pq

    for file in (*config.data.train_files, *config.data.val_files):
        has = pq.read_schema(file).names
        for key in keys:
            name = getattr(config.data, key)
            if name not in has:
                yield f"data.{key}={name}: {file} has no such column; it has {', '.join(has)}"


def _ppo_files(config: Any) -> Iterator[str]:
    custom, trainer = config.custom_reward_function.path, config.trainer
    if custom is not None and not by_path.is_path(custom) and not Path(custom).is_file():
        yield f"custom_reward_function.path={custom}: there is no such file"
    if trainer.resume_mode == "resume_path" and not Path(trainer.resume_from_path).is_dir():
        yield f"trainer.resume_from_path={trainer.resume_from_path}: there is no such folder"
    yield from _writable("trainer.rollout_data_dir", trainer.rollout_data_dir)


def _writable(key: str, folder: str) -> Iterator[str]:
    """The folder, or the nearest parent that exists, must be a folder that this user may write to."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir():
        yield f"{key}={folder}: {path} is a file; choose another folder"
    elif not os.access(path, os.W_OK | os.X_OK):
        yield f"{key}={folder}: this user may not write to {path}; choose another folder"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
