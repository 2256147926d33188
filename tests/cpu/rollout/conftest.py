"""The tiny checkpoints that the rollout tests share."""

import pytest
from rollout_helpers import save_model


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> list[str]:
    """Folders of two checkpoints of one shape and different weights."""
    return [save_model(tmp_path_factory.mktemp(f"qwen2_{seed}"), seed) for seed in (0, 1)]
