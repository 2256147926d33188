"""The package as a whole: light imports, the directions imports may go, sizes of files, and the wheel."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hybridrl

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hybridrl"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TRACKED_BYTES = 500, 60, 1_000_000

# Where each of the heavy libraries may be imported: folders, or single files.
LIBRARIES = {
    "megatron": ("megatron/",),
    "vllm": ("rollout/", "weights/vllm_engine.py"),
    "ray": ("cluster/", "rollout/"),
}
# Which parts of the package a part may import. "" stands for the modules beside the folders (config.py and the like).
PARTS = {
    "trainer": {"", "cluster", "rollout", "rewards", "megatron", "algorithms", "data", "telemetry", "weights", "ops"},
    "cluster": {"", "algorithms", "data", "weights", "ops"},
    "rollout": {"", "algorithms", "data", "weights", "ops"},
    "megatron": {"", "algorithms", "data", "weights", "ops"},
    "rewards": {"", "algorithms", "data", "weights", "ops"},
    "telemetry": {"", "weights", "ops"},
    "algorithms": {"ops"},
    "data": set(),
    "weights": {"ops"},
    "ops": set(),
    "": {"", "algorithms", "data", "rewards", "telemetry", "weights", "ops"},
}


def sources(*folders):
    """Python files under the folders of the repository (all of it by default), but nothing generated."""
    for folder in folders or ("hybridrl", "tests", "benchmarks", "launch"):
        yield from sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(tree, path):
    """Absolute dotted names of everything that a module imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def part_of(dotted):
    """The part of the package that hybridrl.a.b belongs to: its folder, or "" for a module beside the folders."""
    names = dotted.split(".")
    return names[1] if len(names) > 1 and (PACKAGE / names[1]).is_dir() else ""


def wrong_imports(path, text):
    """What is wrong with the imports of one module of the package, in words."""
    inside = path.relative_to(PACKAGE).as_posix()
    part = inside.split("/")[0] if "/" in inside else ""
    if part not in PARTS:
        return [f"{inside}: {part}/ is not in the design's list of parts"]
    wrong = []
    for name in imported(ast.parse(text), path):
        top = name.split(".")[0]
        if top in LIBRARIES and not inside.startswith(LIBRARIES[top]):
            wrong.append(f"{inside} imports {name}, which only {' and '.join(LIBRARIES[top])} may")
        if top == "hybridrl":
            other = part_of(name)
            native = part == "ops" and name == "hybridrl._C"
            bare = name.split(".")[1:] in ([], ["__version__"], ["config_dir"])
            if other != part and other not in PARTS[part] and not native and not bare:
                wrong.append(f"{inside} imports {name}: {part or 'the top level'} may not import {other or 'it'}")
    return wrong


def test_imports_go_one_way():
    wrong = [line for path in sources("hybridrl") for line in wrong_imports(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "file, line",
    [
        ("data/x.py", "import ray"),
        ("weights/x.py", "from megatron.core import parallel_state"),
        ("weights/x.py", "import vllm"),
        ("trainer/x.py", "def f():\n    import vllm.config"),
        ("megatron/x.py", "import ray.util"),
        ("data/x.py", "from hybridrl.algorithms import kl"),
        ("algorithms/x.py", "from ..data.packed import pack"),
        ("algorithms/x.py", "from hybridrl.config import PPOConfig"),
        ("ops/x.py", "import hybridrl.weights.layout"),
        ("rollout/x.py", "from hybridrl import trainer"),
        ("config.py", "from hybridrl.megatron.engine import Engine"),
        ("misc/x.py", "import os"),
    ],
)
def test_the_import_rule_sees(file, line):
    """The rule itself can fail."""
    assert wrong_imports(PACKAGE / file, line)


@pytest.mark.parametrize(
    "file, line",
    [
        ("weights/vllm_engine.py", "import vllm"),
        ("cluster/ray.py", "import ray"),
        ("algorithms/x.py", "from hybridrl.ops.gae import gae"),
        ("ops/x.py", "from hybridrl import _C"),
        ("trainer/x.py", "from hybridrl.rollout import fleet"),
        ("data/x.py", "from .files import read_table"),
    ],
)
def test_the_import_rule_allows(file, line):
    assert not wrong_imports(PACKAGE / file, line)


def test_files_and_functions_are_short():
    long = []
    for path in [*sources(), ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]:
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            long.append(f"{name}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}")
    assert not long, "\n".join(long)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_large_file_is_tracked():
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    paths = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    large = [f"{path}: {path.stat().st_size} bytes" for path in paths if path.stat().st_size > MAX_TRACKED_BYTES]
    assert not large, "\n".join(large)


def run_python(code, *arguments, **environment):
    """Runs code in a fresh interpreter outside the repository and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, cwd="/", timeout=300, env=os.environ | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_version_and_a_light_import():
    code = (
        "import sys; before = set(sys.modules); import hybridrl; print(hybridrl.__version__);"
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'ray', 'vllm', 'megatron', 'hydra') if m in sys.modules])"
    )
    assert run_python(code).split("\n")[:2] == [hybridrl.__version__, "[]"]


IMPORT_ALL = """
import importlib, sys
forbidden, names = sys.argv[1].split(","), sys.argv[2:]
for name in names:
    importlib.import_module(name)
    loaded = [m for m in forbidden if m in sys.modules]
    assert not loaded, f"importing {name} loads {loaded}"
torch = sys.modules.get("torch")
assert torch is None or not torch.cuda.is_initialized(), "CUDA was initialised"
"""


def modules_of(part):
    """Dotted names of the modules in a folder of the package, entry points (`__main__`) left out."""
    for path in sources(f"hybridrl/{part}"):
        names = path.relative_to(ROOT).with_suffix("").parts
        if names[-1] != "__main__":
            yield ".".join(names[:-1] if names[-1] == "__init__" else names)


def test_pure_parts_load_no_heavy_library():
    names = [n for part in ("algorithms", "data", "telemetry", "rewards", "ops") for n in modules_of(part)]
    assert "hybridrl.algorithms.kl" in names
    run_python(IMPORT_ALL, "ray,vllm,megatron", *names)


def test_entry_points_load_neither_ray_nor_vllm():
    names = [n for n in modules_of("trainer") if n.rpartition(".")[2].startswith("main_")]
    run_python(IMPORT_ALL, "ray,vllm", "hybridrl", *names)


def test_native_module_loads_by_itself():
    """Without PyTorch in the process (csrc does not link it) and without a GPU's driver."""
    code = "import sys; from hybridrl import _C; print(_C.cuda_built, 'torch' in sys.modules)"
    assert run_python(code).split() in (["True", "False"], ["False", "False"])


def test_config_dir(tmp_path):
    """A wheel's own copy comes first, then the checkout's folder; neither is an error that says what to do."""
    package = tmp_path / "hybridrl"
    package.mkdir()
    shutil.copy(PACKAGE / "__init__.py", package)
    find = "import sys; sys.path.insert(0, sys.argv[1]); import hybridrl; print(hybridrl.config_dir())"
    report = "try:\n    hybridrl.config_dir()\nexcept FileNotFoundError as e:\n    print(e)"
    head = find.rpartition(";")[0]
    assert "install hybridrl again" in run_python(f"{head}\n{report}", str(tmp_path))
    for folder in (tmp_path / "configs", package / "_configs"):
        folder.mkdir()
        assert run_python(find, str(tmp_path)).strip() == str(folder)


def test_wheel(tmp_path):
    """pip builds it; it holds every module, the native one, and configs/; the native one loads from it."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("hybridrl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    missing = {path.relative_to(ROOT).as_posix() for path in sources("hybridrl")} - names
    configs = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    missing |= {f"hybridrl/_configs/{path.as_posix()}" for path in configs} - names
    assert not missing, missing
    assert any(name.startswith("hybridrl/_C.") and name.endswith(".so") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "hybridrl/telemetry/templates/report.html.j2" in names
    code = "import sys; sys.path.insert(0, sys.argv[1]); from hybridrl import _C; print(_C.__file__)"
    assert run_python(code, str(tmp_path / "site")).startswith(str(tmp_path))


@pytest.mark.parametrize("entry", ["main_ppo", "main_sft", "main_eval"])
def test_help_of_an_entry_point_is_light(entry):
    code = (
        f"from hybridrl.trainer import {entry}; help({entry}); import sys; "
        "heavy = {'ray', 'vllm', 'torch', 'megatron'} & set(sys.modules); assert not heavy, heavy"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"python -m hybridrl.trainer.{entry}" in out or "-m hybridrl.trainer." in out
