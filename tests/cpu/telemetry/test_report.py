"""The report: its numbers, what it leaves out, and that nothing from a run gets out of its place in the page."""

import json
import re
from html.parser import HTMLParser

import pytest

from hybridrl.telemetry.history import History
from hybridrl.telemetry.report import bucketed, build, cards, main, outcome, phase_chart
from hybridrl.telemetry.samples import compare_samples
from hybridrl.telemetry.trackers import Trackers

ACC = "val-core/arithmetic/acc/mean@1"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


def _step(critic=True, **more):
    metrics = {"critic/score/mean": 0.5, "response_length/mean": 20, "actor/ppo_kl": 0.002, "actor/entropy": 0.4}
    metrics |= {"timing_s/step": 10.0, "timing_s/gen": 4.0, "timing_s/update_actor": 3.0, "timing_s/gen/sleep": 1.0}
    metrics |= {"perf/total_num_tokens": 500, "perf/cpu_memory_used_gb": 7.5, "perf/throughput": 25.0}
    if critic:
        metrics |= {"critic/vf_loss": 0.1, "critic/vf_explained_var": 0.6}
    return metrics | more


def _samples(answers, acc):
    prompts = [f"problem {i}" for i in range(len(answers))]
    truth = ["t"] * len(answers)
    return {"prompt": prompts, "response": answers, "ground_truth": truth, "score": acc, "acc": acc}


def _run(folder, steps=3, experiment="experiment", validate=True, **options):
    trackers = Trackers([], folder, "project", experiment, {"a": {"b": 1}}, hardware="a machine")
    if validate:
        trackers.log({ACC: 0.25}, 0)
        trackers.log_samples(_samples(["w", "w", "r", "w"], [0.0, 0.0, 1.0, 0.0]), 0)
    for step in range(1, steps + 1):
        trackers.log(_step(**options), step)
    if validate:
        trackers.log({ACC: 0.75}, steps)
        trackers.log_samples(_samples(["r", "r", "w", "w"], [1.0, 1.0, 0.0, 0.0]), steps)
    trackers.finish()
    return build(folder)


class _Page(HTMLParser):
    """Tags with their attributes, the text outside scripts, the embedded data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.data, self._inside = [], "", "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside = [tag, dict(attributes)]

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = []

    def handle_data(self, data):
        if not self._inside:
            self.text += data
        elif self._inside[1].get("id") == "data":
            self.data += data


def _page(path):
    return _Page(path.read_text(encoding="utf-8"))


def test_headline_charts_and_samples(tmp_path):
    page = _page(_run(tmp_path))
    text = " ".join(page.text.split())
    assert "25.0% → 75.0% ×3" in text and "4 problems, step 0 to step 3" in text
    assert "2 newly solved" in text and "1 solved before only" in text and "1 never solved" in text
    data = json.loads(page.data)
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:3] == ["Held-out accuracy", "Reward", "Response length"]
    assert {"Entropy", "Value loss", "Explained variance", "Memory"} <= set(titles)
    assert sum(name == "section" for name, _ in page.tags) == len(titles) + 1
    assert "a machine" in text and "b: 1" in text


def test_the_page_needs_no_network(tmp_path):
    path = _run(tmp_path)
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|fetch\(", path.read_text().replace("http://www.w3.org", ""))


def test_texts_of_a_run_cannot_leave_their_place(tmp_path):
    clean = _page(_run(tmp_path / "clean"))
    trackers = Trackers([], tmp_path / "evil", EVIL, EVIL, {"key": EVIL}, hardware=EVIL)
    evil = f"val-core/{EVIL}/acc/mean@1"
    trackers.log({evil: 0.25}, 0)
    trackers.log_samples(_samples([EVIL] * 4, [0.0, 0.0, 1.0, 0.0]), 0)
    for step in (1, 2, 3):
        trackers.log(_step(), step)
    trackers.log({evil: 0.75}, 3)
    trackers.log_samples(_samples([EVIL] * 4, [1.0, 1.0, 0.0, 0.0]), 3)
    trackers.finish()
    page = _page(build(tmp_path / "evil"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean.tags]
    assert page.text.count(EVIL) >= 10
    assert json.loads(page.data)["charts"][0]["lines"][0]["metric"] == evil


def test_no_critic_no_validation_one_step(tmp_path):
    page = _page(_run(tmp_path, steps=1, critic=False, validate=False))
    titles = [chart["title"] for chart in json.loads(page.data)["charts"]]
    assert "Reward" in titles and not {"Held-out accuracy", "Value loss", "Explained variance"} & set(titles)
    assert "Critic" not in page.text and "Answers" not in page.text and "Held-out" not in page.text


def test_not_a_number_becomes_a_gap(tmp_path):
    page = _page(_run(tmp_path, **{"actor/grad_norm": float("nan"), "actor/entropy": float("inf")}))
    titles = [chart["title"] for chart in json.loads(page.data)["charts"]]
    assert "Entropy" not in titles and "Gradient norm" not in titles
    assert "NaN" not in page.data


def test_validation_alone_still_makes_a_page(tmp_path):
    page = _page(_run(tmp_path, steps=0))
    assert "75.0%" in page.text
    assert json.loads(page.data)["phases"] is None


def test_phases_stack_up_to_the_step():
    chart = phase_chart(History({1: _step(), 2: _step(**{"timing_s/odd_job": 1.0})}))
    layers = {layer["label"]: layer["y"] for layer in chart["layers"]}
    assert layers == {"generate": [4, 4], "update actor": [3, 3], "odd job": [0, 1], "other": [3, 2]}
    assert sum(layer["share"] for layer in chart["layers"]) == pytest.approx(1)


def test_cards_and_outcome():
    history = History({0: {ACC: 0.1}, 1: _step(), 2: _step(**{ACC: 0.9}), 3: _step(**{ACC: 0.8})})
    (result,) = outcome(history)
    assert (result["first"], result["best"], result["last"]) == ((0, 0.1), (2, 0.9), (3, 0.8))
    found = {card["label"]: card["value"] for card in cards(history)}
    expected = {"Training steps": "3", "Time in steps": "30s", "Tokens per second": "50.0", "Peak memory": "7.5 GiB"}
    assert found == expected


def test_bucketing_averages_runs_of_points():
    assert bucketed([1, 2, 3, 4, 5], [1.0, 3.0, float("nan"), 5.0, float("nan")], 3) == ([2, 4, 5], [2.0, 5.0, None])
    assert bucketed([], [], 3) == ([], [])


def test_samples_match_by_prompt_whatever_their_order(tmp_path):
    trackers = Trackers([], tmp_path, "p", "e", hardware="m")
    trackers.log_samples({"prompt": ["a", "b", "b"], "response": ["a0", "b0", "b1"], "score": [0.0, 0.0, 1.0]}, 2)
    trackers.log_samples({"prompt": ["b", "b", "a"], "response": ["B0", "B1", "A0"], "score": [1.0, 1.0, 0.0]}, 10)
    trackers.finish()
    found = compare_samples(tmp_path / "validation")
    assert (found["first_step"], found["last_step"], found["total"]) == (2, 10, 3)
    pairs = {(row["before"]["text"], row["after"]["text"]): row["outcome"] for row in found["rows"]}
    assert pairs == {("a0", "A0"): "missed", ("b0", "B0"): "gained", ("b1", "B1"): "kept"}


def test_command_line(tmp_path, capsys):
    _run(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert main([str(tmp_path)]) == 1
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
