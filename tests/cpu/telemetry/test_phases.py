"""Phase timer and memory numbers."""

import os
import subprocess
import sys

import pytest

from hybridrl.telemetry import phases


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    return now


def test_phases_add_up_and_nest(clock):
    seen = []
    timer = phases.PhaseTimer(seen.append)
    with timer("step"):
        with timer("gen"):
            clock[0] += 2
            with timer("sleep"):
                clock[0] += 1
        with timer("gen"):
            clock[0] += 4
        clock[0] += 0.5
    assert timer.drain() == {"gen/sleep": 1, "gen": 7, "step": 7.5}
    assert timer.seconds == {}
    assert seen == ["gen", "gen/sleep", "gen"]


def test_a_failing_phase_is_still_counted_and_closed(clock):
    timer = phases.PhaseTimer()
    with pytest.raises(RuntimeError), timer("gen"):
        clock[0] += 3
        raise RuntimeError
    with timer("adv"):
        clock[0] += 1
    assert timer.seconds == {"gen": 3, "adv": 1}


def test_memory_is_in_gib_and_peaks_do_not_fall():
    before = phases.memory_metrics("actor/perf")
    block = bytearray(os.urandom(1 << 20)) * 200
    held = phases.memory_metrics("actor/perf")
    del block
    after = phases.memory_metrics("actor/perf")
    assert 0.15 < held["actor/perf/cpu_memory_rss_gb"] - before["actor/perf/cpu_memory_rss_gb"] < 0.25
    assert after["actor/perf/cpu_memory_rss_peak_gb"] >= held["actor/perf/cpu_memory_rss_gb"] - 0.02
    assert held["actor/perf/cpu_memory_used_gb"] > 0


def test_hardware_line_names_cores_and_memory():
    line = phases.hardware_line()
    assert f"{len(os.sched_getaffinity(0))} cores" in line and "GiB memory" in line


def test_telemetry_loads_neither_torch_nor_the_engines():
    modules = "metrics, phases, trackers, report, check"
    script = f"import sys; from hybridrl.telemetry import {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "megatron", "vllm", "plotly"} & set(loaded)
