"""A cluster of two Ray nodes on this machine: one rank and one vLLM engine on each, the weights in the run folder."""

import os
import subprocess
import sys

import pytest
from test_end_to_end import ROOT, arguments, check_run, leftovers, world  # noqa: F401


@pytest.fixture
def address():
    from ray.cluster_utils import Cluster

    common = dict(num_gpus=0, object_store_memory=150 * 2**20)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, **common))
    try:
        cluster.add_node(num_cpus=2, **common)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def test_a_rank_and_an_engine_on_each_of_two_nodes(world, tmp_path, address):  # noqa: F811
    extra = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1", "actor_rollout_ref.rollout.num_replicas=2"]
    args = arguments(world, tmp_path / "run", *extra, "algorithm.adv_estimator=grpo")
    env = os.environ | {"RAY_ADDRESS": address, "HYBRIDRL_TEST_RUN": f"two-{os.getpid()}"}
    command = [sys.executable, "-m", "hybridrl.trainer.main_ppo", *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, out[-6000:]
    check_run(tmp_path / "run", critic=False)
    assert not leftovers(f"two-{os.getpid()}")
    assert not list((tmp_path / "run").glob(".weights-*"))
    nodes = actors_nodes(address)
    assert len(nodes["_Rank"]) == 2 and nodes["VllmServer"] == nodes["_Rank"]


def actors_nodes(address: str) -> dict[str, set[str]]:
    """Class name -> nodes that had its actors, by Ray's own record of the ended job."""
    code = (
        "import ray, json, collections\n"
        f"ray.init(address={address!r}, logging_level='ERROR', log_to_driver=False)\n"
        "from ray._private.state import actors\n"
        "found = collections.defaultdict(list)\n"
        "for a in actors().values():\n"
        "    found[a['ActorClassName']].append(a['Address']['NodeID'])\n"
        "print(json.dumps(found))\n"
    )
    import json

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    return {name: set(nodes) for name, nodes in json.loads(out.splitlines()[-1]).items()}
