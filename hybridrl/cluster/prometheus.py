"""A tracker on the endpoint of the Ray session that this process is in, for Prometheus."""

import re

from ray.util.metrics import Gauge


class RayMetrics:
    """Gauges on Ray's Prometheus endpoint, where the driver is in a Ray session: hybridrl_ and the metric's name with
    _ for what Prometheus does not take, tagged with project and experiment."""

    def __init__(self, project: str, experiment: str):
        self._tags = {"project": project, "experiment": experiment}
        self._gauges: dict[str, Gauge] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in {"training/step": step, **metrics}.items():
            if name not in self._gauges:
                plain = "hybridrl_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(plain, description=name, tag_keys=tuple(self._tags))
                self._gauges[name].set_default_tags(self._tags)
            self._gauges[name].set(float(value))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Prometheus has numbers only."""

    def close(self) -> None:
        """The gauges end with the driver."""
