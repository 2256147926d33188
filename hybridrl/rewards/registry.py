"""Which reward function scores a sample: by its data source, or the user's own for all of them."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from hybridrl.algorithms import by_path

MODULES = {
    "openai/gsm8k": "hybridrl.rewards.gsm8k",
    "DigitalLearningGmbH/MATH-lighteval": "hybridrl.rewards.math",
    "lighteval/MATH": "hybridrl.rewards.math",
    "HuggingFaceH4/MATH-500": "hybridrl.rewards.math",
    "arithmetic": "hybridrl.rewards.arithmetic",
}


def check_source(data_source: str) -> None:
    """ValueError when no built-in function scores `data_source`."""
    if data_source not in MODULES:
        raise ValueError(f"no reward function for data_source {data_source!r} (there are: {', '.join(MODULES)}): set "
                         "custom_reward_function.path to a file with a function of your own")


def find(data_source: str) -> Callable:
    """The compute_score of `data_source`; imported on first use, since some need heavy libraries."""
    check_source(data_source)
    return importlib.import_module(MODULES[data_source]).compute_score


def load_custom(path: str, name: str) -> Callable:
    """The function `name` from the Python file `path`, or the function that `path` names as package.module:function.

    ValueError naming the key and the mend when the file is missing or does not import, or the function is missing or
    cannot be called as verl's compute_score(data_source, solution_str, ground_truth, extra_info).
    """
    if by_path.is_path(path):
        return _checked(by_path.load(path, "custom_reward_function.path"), path.split(":")[1], path)
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"custom_reward_function.path: no such file: {file}. Correct the path.")
    spec = importlib.util.spec_from_file_location("hybridrl_custom_reward", file)
    if spec is None:
        raise ValueError(f"custom_reward_function.path: {file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ValueError(f"custom_reward_function.path: {file} does not import: {type(error).__name__}: {error}. "
                         "Correct the file.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"custom_reward_function.name: {file} has no function {name!r}. Define it, or name another.")
    return _checked(function, name, file)


def _checked(function: Callable, name: str, file: str | Path) -> Callable:
    """The function, if it can be called as a reward."""
    try:
        inspect.signature(function).bind(data_source="", solution_str="", ground_truth="", extra_info={})
    except TypeError as error:
        raise ValueError(f"custom_reward_function.name: {name}{inspect.signature(function)} in {file} cannot be called "
                         f"as {name}(data_source=, solution_str=, ground_truth=, extra_info=): {error}. Give it these "
                         "parameters.") from error
    return function
