"""README and docs/ say what is so: links, modules, test paths, configuration keys, and the code blocks that can run."""

import importlib.util
import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import yaml

from hybridrl import compat_verl
from hybridrl.algorithms import advantages, policy_losses
from hybridrl.algorithms.aggregation import Denominators
from hybridrl.config import PPOConfig, SFTConfig, leaves, markdown
from hybridrl.rewards import registry

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# Only paths of the repository: a page may name files of a run, too.
PATH = re.compile(r"(?:tests|hybridrl|configs|launch|benchmarks|docs|csrc)/[\w./-]+")
KEY = re.compile(r"[+~]*([a-z_0-9]+(?:\.[a-z_0-9*]+)+)(?:=.*)?")
LEAVES = {**leaves(PPOConfig), **leaves(SFTConfig)}
GROUPS = {name.rsplit(".", depth)[0] for name in LEAVES for depth in range(1, name.count(".") + 1)}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def outside_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def quoted(page):
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", outside_code(page.read_text()))


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", outside_code(page.read_text())):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: no heading {anchor} in {path}"


@pages
def test_paths_exist(page):
    """In text and in commands; NAME and the like stand for something."""
    for path in PATH.findall(re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S)):
        assert re.search(r"[A-Z]{3,}", path) or (ROOT / path.rstrip(".")).exists(), f"{page.name}: {path}"


@pages
def test_modules_exist(page):
    for name in re.findall(r"-m (hybridrl[\w.]*)", page.read_text()):
        assert importlib.util.find_spec(name), f"{page.name}: python -m {name}"


def known_to_verl(key):
    return any(fnmatchcase(key, pattern) for table in (compat_verl.PPO, compat_verl.SFT) for pattern in table)


def unknown_keys(words, verl=False):
    """Dotted words that look like keys of a configuration and are none."""
    tops = {name.split(".")[0] for name in LEAVES} | ({"reward_model", "ray_init"} if verl else set())
    for word in words:
        match = KEY.fullmatch(word)
        if not match or match[1].split(".")[0] not in tops or match[1].endswith((".py", ".json", ".jsonl", ".md")):
            continue
        key = match[1].removesuffix(".*")
        inside = any(key.startswith(f"{leaf}.") and "dict" in str(LEAVES[leaf].type) for leaf in LEAVES)
        # algorithm.x: verl has whole groups that hybridrl has not
        of_verl = verl and (known_to_verl(key) or known_to_verl(f"{key}.x"))
        if key not in LEAVES and key not in GROUPS and not inside and not of_verl:
            yield key


@pages
def test_keys_exist(page):
    """In backticks, and in the commands. The page about verl may name verl's keys, which compat_verl must know."""
    verl = page.name == "coming_from_verl.md"
    commands = "\n".join(code_blocks(page, ""))
    in_commands = [word for word in re.split(r'[\s"]+', commands) if "=" in word]
    assert list(unknown_keys([*quoted(page), *in_commands], verl)) == []


def test_the_key_rule_sees():
    assert list(unknown_keys(["trainer.nodes=2", "critic.optim.rate", "data.train_files=x"])) == [
        "trainer.nodes",
        "critic.optim.rate",
    ]


def test_recipes_named_exist():
    for page in PAGES:
        for name in re.findall(r"--config-name[ =](recipes/\w+)", page.read_text()):
            assert yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


def test_page_of_keys_is_current():
    page = ROOT / "docs" / "config_keys.md"
    assert page.read_text().strip() == markdown().strip(), "config_keys.md is old. Mend: make docs"


def test_readme_rows_that_work_name_a_test():
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) ?\|$", (ROOT / "README.md").read_text(), flags=re.M)
    works = [row for row in rows if row[1].startswith("works")]
    assert len(works) > 15
    for what, _, proof in works:
        assert re.search(r"`tests/[\w/]+\.py`|`benchmarks/results/", proof), what


@pages
def test_bash_blocks_parse(page):
    for block in code_blocks(page, ""):
        if re.match(r"(python|make|ray|source|pip|sbatch|export|launch|SUBMISSION_ID)", block):
            text = block.replace("...", "")
            result = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
            assert result.returncode == 0, f"{page.name}: {result.stderr}\n{block}"


@pages
def test_python_blocks_parse(page):
    for block in code_blocks(page, "python"):
        compile(block, page.name, "exec")


# -- the blocks of adding_an_algorithm.md run --------------------------------------------------------------------------


def block_for(file):
    (found,) = [b for b in code_blocks(ROOT / "docs/adding_an_algorithm.md", "python") if b.startswith(f"# {file}\n")]
    return found


def batch():
    mask, cu = torch.tensor([1.0, 1, 1, 0, 1]), torch.tensor([0, 2, 5])
    return mask, cu


def test_the_estimator_of_the_page_works(monkeypatch):
    monkeypatch.setattr(advantages, "_ESTIMATORS", dict(advantages._ESTIMATORS))
    exec(block_for("hybridrl/algorithms/advantages.py"), dict(vars(advantages)))
    assert "batch_mean" in advantages.names() and not advantages.needs_critic("batch_mean")
    mask, cu = batch()
    rewards = advantages.place_scores(torch.tensor([1.0, 0.0]), mask, cu)
    inputs = advantages.AdvantageInputs(rewards, mask, cu, torch.tensor([0, 1]))
    found, _ = advantages.compute("batch_mean", inputs)
    assert found.tolist() == [0.5, 0.5, -0.5, 0.0, -0.5]


def test_the_loss_of_the_page_works(monkeypatch):
    monkeypatch.setattr(policy_losses, "_LOSSES", dict(policy_losses._LOSSES))
    exec(block_for("hybridrl/algorithms/policy_losses.py"), dict(vars(policy_losses)))
    mask, cu = batch()
    logprobs = torch.tensor([-1.0, -2, -3, -4, -5], requires_grad=True)
    adv = torch.tensor([1.0, 1, -1, 9, -1])
    inputs = policy_losses.PolicyLossInputs(logprobs, logprobs.detach(), adv, mask, cu, Denominators.of(mask, cu))
    loss, metrics = policy_losses.policy_loss("squared_ratio", inputs)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 2 - 3 - 5) / 4) and metrics["actor/squared_log_ratio"] == 0
    assert logprobs.grad.tolist() == [-0.25, -0.25, 0.25, 0.0, 0.25]


def test_the_reward_of_the_page_works(tmp_path):
    (tmp_path / "my_reward.py").write_text(block_for("my_reward.py"))
    function = registry.load_custom(str(tmp_path / "my_reward.py"), "compute_score")
    sample = dict(data_source="x", solution_str="it is 42.", ground_truth="42", extra_info={})
    assert function(**sample) == {"score": pytest.approx(0.997), "acc": 1.0}
