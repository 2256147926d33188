"""The built-in rules and their routing."""

import pytest

from hybridrl.rewards import arithmetic, gsm8k, math, registry


@pytest.mark.parametrize("text, truth, strict, flexible", [
    ("so 5+5=10\n#### 10", "10", 1, 1),
    ("#### 3\nno wait\n#### 10", "10", 1, 1),
    ("#### 1,000", "1000", 1, 0),
    ("#### -7", "-7", 1, 1),
    ("####10", "10", 0, 1),
    ("#### $10", "10", 0, 1),
    ("the answer is 10.", "10", 0, 0),
    ("the answer is 10 .", "10", 0, 1),
    ("#### 10.0", "10", 0, 0),
    ("#### 11", "10", 0, 0),
    ("", "10", 0, 0),
    ("#### 10" + " filler" * 60, "10", 0, 0),
])
def test_gsm8k(text, truth, strict, flexible):
    assert gsm8k.compute_score("openai/gsm8k", text, truth) == {"score": strict, "acc": strict}
    assert gsm8k.compute_score_flexible("openai/gsm8k", text, truth)["score"] == flexible


@pytest.mark.parametrize("text, score", [
    ("7+5=12, 3+4+1=8 #### 82", 1), ("#### 82\n", 1), ("#### 82 and more", 0), ("#### 082", 0), ("82", 0),
    ("#### 82 #### 83", 0), ("#### 83 #### 82", 1), ("", 0),
])
def test_arithmetic(text, score):
    assert arithmetic.compute_score("arithmetic", text, "82", {})["score"] == score


@pytest.mark.parametrize("text, truth, score", [
    (r"thus \boxed{\frac{1}{2}}", "0.5", 1),
    (r"thus \boxed{\frac{1}{3}}", "0.5", 0),
    (r"first \boxed{3}, but in the end \boxed{4}", "4", 1),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", 1),
    (r"\boxed{(1,2)}", "(1, 2)", 1),
    (r"The answer is $\sqrt{8}$.", r"2\sqrt{2}", 1),
    ("no answer here", "4", 0),
    ("", "4", 0),
    ("\\boxed{7}" + " filler" * 5000 + "\\boxed{8}", "8", 1),
    (r"\boxed{" * 2000, "8", 0),
])
def test_math(text, truth, score):
    assert math.compute_score("lighteval/MATH", text, truth)["score"] == score


def test_routing():
    assert registry.find("openai/gsm8k") is gsm8k.compute_score
    assert registry.find("DigitalLearningGmbH/MATH-lighteval") is math.compute_score
    assert registry.find("arithmetic") is arithmetic.compute_score
    with pytest.raises(ValueError, match="'poems'.*custom_reward_function.path"):
        registry.check_source("poems")


@pytest.mark.parametrize("text, key, match", [
    (None, "path", "no such file"),
    ("import nothing_like_that", "path", "does not import: ModuleNotFoundError"),
    ("raise SystemExit(3)", "path", "does not import: SystemExit"),
    ("def compute_score(", "path", "does not import: SyntaxError"),
    ("def other(): pass", "name", "no function 'compute_score'"),
    ("compute_score = 3", "name", "no function 'compute_score'"),
    ("def compute_score(solution): return 1", "name", "cannot be called"),
    ("def compute_score(data_source, solution_str, ground_truth, extra_info, more): return 1", "name", "'more'"),
])
def test_custom_function_faults(tmp_path, text, key, match):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"custom_reward_function.{key}.*{match}"):
        registry.load_custom(str(file), "compute_score")


def test_custom_function_loads(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(data_source, solution_str, ground_truth, **rest): return 0.5")
    assert registry.load_custom(str(file), "score")("a", "b", "c", extra_info={}) == 0.5
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="must end in .py"):
        registry.load_custom(str(tmp_path / "mine.txt"), "score")


def test_custom_function_by_import_path(tmp_path, monkeypatch):
    text = "def score(data_source, solution_str, ground_truth, **rest): return 0.5"
    (tmp_path / "module_of_mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.load_custom("module_of_mine:score", "ignored")("a", "b", "c", extra_info={}) == 0.5
    with pytest.raises(ValueError, match="custom_reward_function.path=module_of_mine:other.*no function 'other'"):
        registry.load_custom("module_of_mine:other", "ignored")
