"""The launch scripts: syntax, their arguments, Slurm's node arithmetic with recording stand-ins, and a real Ray job."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"])
BIN = Path(sys.executable).parent


def run(*command, cwd=ROOT, timeout=120, **environment):
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )


def ids(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_bash_syntax(script):
    result = run("bash", "-n", script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_strict_mode(script):
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not on this machine")
@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_shellcheck(script):
    result = run("shellcheck", "--severity=warning", script)
    assert result.returncode == 0, result.stdout


def test_runtime_env_holds_what_ray_takes():
    tree = yaml.safe_load((LAUNCH / "runtime_env.yaml").read_text())
    assert set(tree) == {"working_dir", "excludes", "env_vars"} and list(tree)[-1] == "env_vars"
    assert all(isinstance(value, str) for value in tree["env_vars"].values())
    assert tree["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(excludes=tree["excludes"], env_vars=tree["env_vars"])


def test_ci_runs_make_test():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.search(r"^make .*\btest\b", (ROOT / ".ci" / "run").read_text(), re.M)


# -- torchrun ----------------------------------------------------------------------------------------------------------


def recorder(folder, name, body=""):
    """A program that appends its name and arguments, one a line between marks, to folder/log."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{folder}/log"\n{body}\n')
    path.chmod(0o755)


def test_torchrun_needs_a_number_of_ranks():
    for arguments in ([], ["data.train_files=x"], ["0"]):
        result = run("bash", LAUNCH / "torchrun.sh", *arguments)
        assert result.returncode != 0 and "usage:" in result.stderr


def test_torchrun_reaches_main_sft():
    """A rank really starts, and stops at the first check of main_sft."""
    result = run("bash", LAUNCH / "torchrun.sh", 1, "data.train_files=none.parquet", "trainer.device=cpu")
    assert result.returncode != 0
    assert "model.path: name the Hugging Face folder" in result.stderr


def test_torchrun_on_several_nodes(tmp_path):
    recorder(tmp_path, "python")
    arguments = (2, "a.b=1")
    missing = run("bash", LAUNCH / "torchrun.sh", *arguments, NNODES="2", PYTHON=str(tmp_path / "python"))
    assert missing.returncode != 0 and "NODE_RANK" in missing.stderr
    settings = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="first", PYTHON=str(tmp_path / "python"))
    assert run("bash", LAUNCH / "torchrun.sh", *arguments, **settings).returncode == 0
    assert (tmp_path / "log").read_text().strip() == (
        "python -m torch.distributed.run --nnodes 2 --node_rank 1 --master_addr first --master_port 29500 "
        "--nproc_per_node 2 -m hybridrl.trainer.main_sft a.b=1"
    )


# -- Slurm: Slurm's own programs are stand-ins that record what they are asked; no cluster is at hand ------------------


@pytest.fixture
def slurm(tmp_path):
    """An allocation of nodes n1, n2, n3 with 4 GPUs each, submitted from tmp_path."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    recorder(tools, "scontrol", 'printf "n1\\nn2\\nn3\\n"')
    # srun's options are dropped and the rest runs here, once
    drop = 'while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; SLURM_NODEID=0 exec "$@"'
    recorder(tools, "srun", drop)
    recorder(tools, "hostname", "echo 10.0.0.1 10.0.0.2")
    recorder(tools, "ray", "[[ $1 == start ]] && exec sleep 300; exit 0")
    recorder(tools, "python", 'echo "RAY_ADDRESS=$RAY_ADDRESS" >> "$(dirname "$0")/log"; cat > /dev/null')
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "torchrun.sh", tmp_path / "launch")

    def submit(script, *arguments):
        result = run(
            "bash", LAUNCH / "slurm" / script, *arguments, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_NODELIST="n[1-3]",
            SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="16",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return (tools / "log").read_text().splitlines()

    return submit


def test_slurm_starts_a_head_and_a_worker_on_each_other_node(slurm):
    log = slurm("ray_on_slurm.sbatch", "a.b=1")
    starts = [line for line in log if line.startswith("srun") and "ray start" in line]
    nodes = [re.search(r"-w (\S+)", line)[1] for line in starts]
    assert sorted(nodes) == ["n1", "n2", "n3"]
    head = [line for line in starts if "--head" in line]
    assert len(head) == 1 and "-w n1 " in head[0] and "--node-ip-address 10.0.0.1 --port 6379" in head[0]
    assert all("--address 10.0.0.1:6379" in line for line in starts if line not in head)
    assert all("--num-gpus 4" in line and "--num-cpus 16" in line for line in starts)
    keys = "trainer.device=cuda trainer.nnodes=3 trainer.n_gpus_per_node=4 a.b=1"
    main = log.index(f"python -m hybridrl.trainer.main_ppo {keys}")
    assert log[main + 1] == "RAY_ADDRESS=10.0.0.1:6379"
    assert log[:main].count("python - 10.0.0.1:6379 3") == 1  # waits for all nodes first


def test_slurm_runs_torchrun_on_each_node(slurm):
    log = slurm("sft_torchrun.sbatch", "a.b=1")
    assert log[-2] == (
        "python -m torch.distributed.run --nnodes 3 --node_rank 0 --master_addr n1 --master_port 29500 "
        "--nproc_per_node 4 -m hybridrl.trainer.main_sft a.b=1"
    )


# -- Ray ---------------------------------------------------------------------------------------------------------------


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def cluster(monkeypatch):
    """A head started by hand as Ray's documentation does, on ports and with a token of its own: its dashboard and
    process."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: socket paths below it have a length limit
    gcs, dashboard, agent, client = free_ports(4)
    command = [
        BIN / "ray", "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2", "--num-gpus=0",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": ""}
    with open(os.path.join(folder, "head.log"), "w") as log:
        process = subprocess.Popen([str(w) for w in command], stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}", process
    finally:
        process.send_signal(signal.SIGTERM)  # ends the head's processes and no other Ray's
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def submit(address, *arguments, **environment):
    """Submits until the dashboard answers, which takes some seconds after the head's start."""
    deadline = time.monotonic() + 90
    while True:
        result = run(
            "bash", LAUNCH / "ray_submit.sh", *arguments, cwd="/", RAY_API_SERVER_ADDRESS=address, **environment
        )
        if result.returncode == 0 or time.monotonic() > deadline or "connect" not in (result.stderr + result.stdout):
            assert result.returncode == 0, result.stdout + result.stderr
            return
        time.sleep(1)


def test_ray_submit_runs_main_ppo_as_a_job(cluster, tmp_path):
    """The driver runs on the cluster, in a copy of the checkout that has the built csrc and no tests or environments,
    with the submitting shell's NCCL settings; `ray job` status, logs and list tell of it."""
    address, head = cluster
    probe = tmp_path / "python"
    ask = 'echo "FOUND" * hybridrl/_C*.so configs/ppo.yaml\necho "HCA $NCCL_IB_HCA"\nexec python "$@"\n'
    probe.write_text(f"#!/bin/bash\n{ask}")
    probe.chmod(0o755)
    submit(address, "--help", SUBMISSION_ID="help-1", NCCL_IB_HCA="it's mlx5_0", PYTHON=str(probe))
    deadline = time.monotonic() + 120
    while "succeeded" not in (status := run("ray", "job", "status", "--address", address, "help-1").stdout):
        assert "failed" not in status and time.monotonic() < deadline, status
        time.sleep(1)
    assert head.poll() is None
    logs = run("ray", "job", "logs", "--address", address, "help-1").stdout
    assert "data.train_files" in logs and "HCA it's mlx5_0" in logs
    found = re.search("FOUND (.*)", logs)[1].split()
    assert any(re.fullmatch(r"hybridrl/_C.*\.so", name) for name in found), found
    assert {"hybridrl", "configs", "setup.py"} <= set(found) and not {"tests", "docs", "build"} & set(found)
    assert "help-1" in run("ray", "job", "list", "--address", address).stdout
