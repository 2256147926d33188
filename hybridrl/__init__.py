"""hybridrl: reinforcement learning for large language models with Megatron-core trainers, vLLM rollouts and Ray.

Importing the package loads none of those three: each part imports what it needs when it is used.
"""

from pathlib import Path

__version__ = "0.1.0"


def config_dir() -> Path:
    """The folder that holds ppo.yaml, sft.yaml and recipes/: hybridrl/_configs of an installed wheel, configs/ of a
    checkout (and of an editable install). Raises FileNotFoundError where neither is there."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no configuration files: neither {package}/_configs nor {package.parent}/configs exists; "
                            "install hybridrl again (pip install .) or run from a whole checkout")
