"""PPO, GRPO and their relatives with a Megatron actor and critic, vLLM rollouts and Ray.

    python -m hybridrl.trainer.main_ppo data.train_files=train.parquet data.val_files=test.parquet \\
        actor_rollout_ref.model.path=Qwen2.5-0.5B-Instruct trainer.n_gpus_per_node=1 trainer.total_epochs=1

`--help` lists every key, docs/config_keys.md too. Exit status: 0 done, 2 a mistake in the configuration or the data
(nothing was started), 130 interrupted, 1 anything else.
"""

import os
import signal
import sys
import threading


def main(argv: list[str] | None = None) -> int:
    """Parses, checks and runs. Returns the exit status; every process that it started is gone by then."""
    return exit_status(run, sys.argv[1:] if argv is None else argv)


def exit_status(run, argv: list[str]) -> int:
    """Calls run(argv) and turns the user's mistakes, dead processes, Ctrl-C and SIGTERM into a message and a status."""
    from hybridrl.config import ConfigError
    from hybridrl.errors import ProcessDied

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's kill cleans up like Ctrl-C
    try:
        run(argv)
    except ProcessDied as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        if not getattr(error, "early", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: all processes are stopped; the newest whole checkpoint is kept", file=sys.stderr)
        return 130
    return 0


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def run(argv: list[str]) -> None:
    """The run that a command line asks for. ConfigError (a ValueError) before anything starts or is written."""
    from hybridrl.config import PPOConfig
    from hybridrl.configuration import check, detect_machine, load, resolve

    config, tree = load(PPOConfig, argv, "ppo")
    check(config)
    resolved = resolve(config, detect_machine(config.trainer.device))
    from hybridrl.trainer.preflight import check_inputs

    check_inputs(resolved)
    if config.trainer.executor == "torchrun" and int(os.environ["RANK"]) > 0:
        from hybridrl.cluster.torchrun import serve

        return serve()
    train(resolved, tree)


def train(resolved, tree: dict) -> None:
    """Runs a resolved configuration: data first, then the processes, then the loop, then the report."""
    from hybridrl.errors import ProcessDied
    from hybridrl.plan_table import plan_rows
    from hybridrl.rewards.manager import RewardManager
    from hybridrl.telemetry import report
    from hybridrl.telemetry.console import print_table
    from hybridrl.telemetry.trackers import Trackers, check_loggers
    from hybridrl.trainer import checkpoints, debug, settings
    from hybridrl.trainer.cluster_setup import running
    from hybridrl.trainer.ppo import PPOTrainer

    config = resolved.config
    trainer = config.trainer
    with early_errors():
        check_loggers(trainer.logger)
        tokenizer, loader, val_data = load_data(resolved)
        resume = None
        if trainer.debug != "rollout":
            resume = checkpoints.find(trainer.default_local_dir, trainer.resume_mode, trainer.resume_from_path)
        resume_step = checkpoints.read_state(resume)["step"] if resume else None
        resolved = with_steps(resolved, len(loader.dataset))
        if settings.recorded(resolved):
            first, batch = (resume_step or 0) + 1, resolved.batch
            debug.check_tables(trainer.rollout_data_dir, first, batch.total_steps, batch.samples)
        rewards = RewardManager(**settings.reward(resolved))
    try:
        with early_errors():
            for data in [loader.dataset] + ([val_data] if val_data else []):
                rewards.check(data.table["data_source"].to_pylist())
        print_table("Plan", plan_rows(resolved))
        if resume:
            print(f"resuming from {resume}")
        total = resolved.batch.total_steps
        with running(resolved, total) as parts:
            trackers = Trackers(
                trainer.logger,
                trainer.default_local_dir,
                trainer.project_name,
                trainer.experiment_name,
                config_dict=tree,
                total_steps=total,
                resume_step=resume_step,
                others=ray_trackers(trainer),
            )
            try:
                validator = make_validator(resolved, val_data, tokenizer, rewards)
                PPOTrainer(resolved, total, parts, loader, tokenizer, rewards, trackers, validator).fit(resume)
            finally:
                trackers.finish()
    except ProcessDied as error:
        saved = checkpoints.find(trainer.default_local_dir, "auto", None)
        go_on = f"goes on from {saved}" if saved else "starts over: no checkpoint was saved (trainer.save_freq)"
        error.add_note(f"All other processes are stopped. The same command {go_on}.")
        raise
    finally:
        rewards.close()
    if trainer.report:
        print(f"report: {report.build(trainer.default_local_dir)}")


def ray_trackers(trainer) -> list:
    """The tracker of the Ray session, where there is one."""
    if trainer.executor != "ray":
        return []
    from hybridrl.cluster.prometheus import RayMetrics

    return [RayMetrics(trainer.project_name, trainer.experiment_name)]


def load_data(resolved):
    """(tokenizer, PromptLoader, validation PromptDataset or None). ValueError naming the key for bad files."""
    from transformers import AutoTokenizer

    from hybridrl.data.prompts import PromptDataset, PromptLoader
    from hybridrl.trainer import settings

    config = resolved.config
    model = config.actor_rollout_ref.model
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer_path, trust_remote_code=model.trust_remote_code, local_files_only=True
    )
    loader = PromptLoader(
        PromptDataset(tokenizer=tokenizer, **settings.dataset(config.data, validation=False)),
        **settings.loader(config.data),
    )
    val_data = None
    if config.data.val_files and config.trainer.debug is None:
        val_data = PromptDataset(tokenizer=tokenizer, **settings.dataset(config.data, validation=True))
    return tokenizer, loader, val_data


def with_steps(resolved, num_prompts: int):
    """The plan with the number of steps that the data give."""
    from dataclasses import replace

    return replace(resolved, batch=resolved.batch.with_data(num_prompts))


def make_validator(resolved, val_data, tokenizer, rewards):
    """A Validator, or None without validation prompts."""
    from hybridrl.trainer import settings
    from hybridrl.trainer.ppo import stop_ids
    from hybridrl.trainer.validation import Validator

    if val_data is None:
        return None
    sampling = settings.val_sampling(resolved, stop_ids(tokenizer))
    return Validator(val_data, tokenizer, rewards, sampling, resolved.config.actor_rollout_ref.rollout.val_kwargs.n)


class early_errors:
    """Marks ValueErrors raised before any worker starts: they are the user's to mend and need no traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, ValueError):
            error.early = True


if __name__ == "__main__":
    sys.exit(main())
