"""Tiny checkpoints that several folders' tests share."""

import helpers
import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of random Qwen2 checkpoints: `tied` and `untied` embeddings."""
    return {name: helpers.save_model(tmp_path_factory.mktemp(name), name == "tied") for name in ("tied", "untied")}
