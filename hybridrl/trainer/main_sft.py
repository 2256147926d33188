"""Supervised fine-tuning with Megatron, started by torchrun:

    torchrun --nproc_per_node 2 -m hybridrl.trainer.main_sft data.train_files=sft.parquet model.path=MODEL \\
        megatron.tensor_model_parallel_size=2

Started with plain python it runs one rank. Exports RUN/global_step_N/huggingface at the end.
"""

import os
import sys

from hybridrl.trainer.main_ppo import early_errors, exit_status


def main(argv: list[str] | None = None) -> int:
    """Parses, checks and runs. Returns the exit status; see main_ppo."""
    return exit_status(run, sys.argv[1:] if argv is None else argv)


def run(argv: list[str]) -> None:
    """The run that a command line asks for."""
    from transformers import AutoTokenizer

    from hybridrl.config import SFTConfig
    from hybridrl.configuration import check, detect_machine, load, plan_rows, resolve
    from hybridrl.telemetry.console import print_table
    from hybridrl.trainer.preflight import check_inputs
    from hybridrl.trainer.sft import fit, read_pairs

    config, tree = load(SFTConfig, argv, "sft")
    check(config)
    resolved = resolve(config, detect_machine(config.trainer.device))
    check_inputs(resolved)
    model = resolved.config.model
    with early_errors():
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer_path, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
        data = resolved.config.data
        train = read_pairs(data.train_files, tokenizer, data, "data.train_files")
        val = read_pairs(data.val_files, tokenizer, data, "data.val_files") if data.val_files else None
    if int(os.environ.get("RANK", 0)) == 0:
        print_table("Plan", plan_rows(resolved))
    folder = fit(resolved, tokenizer, train, val, tree)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"Hugging Face checkpoint: {folder}")


if __name__ == "__main__":
    sys.exit(main())
