"""Evaluates a Hugging Face checkpoint on validation files, with the keys of main_ppo:

    python -m hybridrl.trainer.main_eval actor_rollout_ref.model.path=CHECKPOINT data.val_files=test.parquet

vLLM generates (greedy unless rollout.val_kwargs.do_sample), the reward functions score. Prints verl's val-core metrics
and writes RUN/validation/step_0.parquet and RUN/metrics.jsonl. No training rank starts.
"""

import sys
from dataclasses import replace

from hybridrl.trainer.main_ppo import early_errors, exit_status


def main(argv: list[str] | None = None) -> int:
    """Parses, checks and runs. Returns the exit status; see main_ppo."""
    return exit_status(run, sys.argv[1:] if argv is None else argv)


def run(argv: list[str]) -> dict[str, float]:
    """The evaluation that a command line asks for; returns its metrics."""
    from hybridrl.config import PPOConfig
    from hybridrl.configuration import check, detect_machine, load, resolve

    config, tree = load(PPOConfig, argv, "eval")
    # Nothing is trained: the files to evaluate stand for both sets, and one rank is enough to resolve the rest.
    files = config.data.val_files or config.data.train_files
    config = replace(config, data=replace(config.data, train_files=files, val_files=files))
    check(config)
    resolved = resolve(config, detect_machine(config.trainer.device))
    from hybridrl.trainer.preflight import check_inputs

    check_inputs(resolved)
    return evaluate(resolved, tree)


def evaluate(resolved, tree: dict) -> dict[str, float]:
    """Generates, scores, logs. The engine and the reward processes are gone when it returns."""
    from hybridrl.rewards.manager import RewardManager
    from hybridrl.rollout.fleet import RolloutFleet
    from hybridrl.telemetry.console import print_table
    from hybridrl.telemetry.trackers import Trackers
    from hybridrl.trainer import settings
    from hybridrl.trainer.main_ppo import load_data, make_validator

    config = resolved.config
    trainer = config.trainer
    with early_errors():
        tokenizer, _, data = load_data(resolved)
        rewards = RewardManager(**settings.reward(resolved))
    with rewards:
        server = replace(settings.server(resolved), load_format="auto", sleep=False)
        fleet = RolloutFleet(server, 1, executor="local")
        fleet.start()
        try:
            found, samples = make_validator(resolved, data, tokenizer, rewards).run(fleet, 0)
        finally:
            fleet.shutdown()
    trackers = Trackers([], trainer.default_local_dir, trainer.project_name, trainer.experiment_name, config_dict=tree)
    trackers.log(found, 0)
    trackers.log_samples(samples, 0)
    trackers.finish()
    rows = [(name, f"{value:.4f}") for name, value in sorted(found.items())]
    print_table(f"{config.actor_rollout_ref.model.path}: {len(samples)} samples", rows)
    return found


if __name__ == "__main__":
    sys.exit(main())
