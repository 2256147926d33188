"""Rules for every test: no network, few threads, GPU tests only where the GPUs are, and no quiet skips.

A test that skips because a package cannot be imported fails: the lock installs all of them, so a missing one is a
broken installation, and a skipped test would hide it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

MISSING = ("could not import", "No module named", "cannot import name", "not installed", "requires installing")
# Used where they are there, but in no lock: only a test of theirs may skip without them.
OPTIONAL = ("transformer_engine", "apex", "flash_attn")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if any(text in reason for text in MISSING) and not any(name in reason for name in OPTIONAL):
        report.outcome = "failed"
        report.longrepr = f"skipped for a missing package, which fails here: {reason}. Mend: make setup"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(report)
    return report


def pytest_collection_modifyitems(config, items):
    """Deselects tests marked gpu(n) where fewer than n GPUs are there."""
    markers = {item: item.get_closest_marker("gpu") for item in items}
    needs = {item: (marker.args[0] if marker.args else 1) for item, marker in markers.items() if marker}
    if not needs:
        return
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    dropped = [item for item, count in needs.items() if count > here]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]
