"""A run's metrics on the endpoint that Prometheus asks: Ray's, in a real session."""

import time
import urllib.request

from hybridrl.cluster.prometheus import RayMetrics
from hybridrl.telemetry.trackers import Trackers


def test_metrics_are_on_rays_endpoint(tmp_path):
    import ray

    ray.init(num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
             _metrics_export_port=0, _system_config={"metrics_report_interval_ms": 500})  # fmt: skip
    try:
        gauges = RayMetrics("my-project", "run-1")
        trackers = Trackers([], tmp_path, "my-project", "run-1", hardware="a machine", others=[gauges])
        trackers.log({"critic/score/mean": 0.625, "val-core/a/acc/mean@1": 0.25}, 3)
        port = ray.nodes()[0]["MetricsExportPort"]
        assert port
        text, deadline = "", time.monotonic() + 60
        while "critic_score_mean" not in text:
            assert time.monotonic() < deadline, text[-2000:]
            time.sleep(0.5)
            trackers.log({"critic/score/mean": 0.625}, 3)
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                continue
        [line] = [line for line in text.splitlines() if line.startswith("ray_hybridrl_critic_score_mean{")]
        assert line.endswith(" 0.625") and 'experiment="run-1"' in line and 'project="my-project"' in line
        trackers.finish()
    finally:
        ray.shutdown()
