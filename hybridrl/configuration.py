"""From a command line to a checked, frozen configuration.

    config, tree = load(PPOConfig, sys.argv[1:], "ppo")  # Hydra's grammar, verl's keys
    check(config)  # the rules between keys
    resolved = resolve(config, detect_machine(config.trainer.device))  # every None filled, ranks and batches planned

Each of them raises ConfigError with all the problems it finds, each naming its keys and the mend.

Hydra composes a plain tree made from the dataclasses, the YAML file named by --config-name and the overrides; what
comes out is held against the dataclasses here, so that a key from YAML and one from the command line get the same
message.
"""

import argparse
import difflib
import math
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import hybridrl
from hybridrl import compat_verl
from hybridrl.config import ConfigError, PPOConfig, default, inner_type, kind_of, leaves
from hybridrl.plan_table import plan_rows
from hybridrl.resolution import Machine, Resolved, ResolvedSFT, detect_machine, resolve
from hybridrl.rules import check

__all__ = [
    "ConfigError",
    "Machine",
    "Resolved",
    "ResolvedSFT",
    "build",
    "check",
    "detect_machine",
    "load",
    "plan_rows",
    "resolve",
    "tree_of",
]


def load(cls: type, argv: list[str], config_name: str) -> tuple[Any, dict]:
    """The configuration that a command line asks for, and the same as a plain nested dict (for config.yaml of the run).

    argv: Hydra overrides (a.b=1, +a.b=1, ++a.b=1; ~a.b gives a key its default again) and --config-name NAME,
    --config-dir FOLDER (or --config-path), --help, --cfg job; the last two print and raise SystemExit.
    Raises ConfigError with everything that is wrong with the keys and their values.
    """
    options = _parse(argv)
    if options.help:
        _print_help(cls, config_name)
        raise SystemExit(0)
    overrides, deletions = _overrides(options.overrides)
    name, folder = _source(options, config_name)
    composed = _compose(cls, name, folder, overrides + deletions, on_defaults=True)
    # A second time without the defaults below it: what is left is what the user said.
    said = _flatten(_compose(cls, name, folder, overrides, on_defaults=False, resolved=False), cls)
    config = build(cls, composed, explicit=frozenset(said))
    tree = tree_of(config)
    if options.cfg:
        import yaml

        print(yaml.safe_dump(tree, sort_keys=False), end="")
        raise SystemExit(0)
    return config, tree


def build(cls: type, tree: dict, explicit: frozenset[str] | None = None) -> Any:
    """The frozen configuration of a nested dict; keys that are missing take their defaults.

    explicit: the dotted keys that the user has set (all that the tree has, if None). verl's other keys are sorted into
    honoured, translated and refused on the way. ConfigError reports all problems of keys, types and choices together.
    """
    table = leaves(cls)
    flat = _flatten(tree, cls)
    explicit = frozenset(flat) if explicit is None else explicit & flat.keys()
    known = {name: value for name, value in flat.items() if name in table}
    unknown = {name: value for name, value in flat.items() if name not in table}
    updates, left, problems = compat_verl.translate(cls, unknown, known, explicit)
    problems += [_unknown_key(name, value, cls) for name, value in left.items()]
    known.update(updates)
    explicit = (explicit & known.keys()) | updates.keys()
    values = {}
    for name, item in table.items():
        if name not in known:
            values[name] = default(item)
            continue
        try:
            values[name] = _coerce(name, compat_verl.value_of(name, known[name]), item)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return _fill(cls, values, "", explicit)


def tree_of(config: Any) -> dict:
    """A configuration as a nested dict of plain values."""
    nested: dict = {}
    for name in leaves(type(config)):
        *groups, last = name.split(".")
        value, into = config, nested
        for part in (*groups, last):
            value = getattr(value, part)
        for part in groups:
            into = into.setdefault(part, {})
        into[last] = value
    return nested


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd", "--config-path", "-cp", dest="config_dir")
    parser.add_argument("overrides", nargs="*")
    parser.error = lambda message: _fail(f"command line: {message}; see --help")
    options, rest = parser.parse_known_args(argv)
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        _fail(
            f"unknown option {flags[0]}: there are --config-name, --config-dir, --cfg job and --help, all else is"
            " key=value"
        )
    options.overrides += rest
    return options


def _fail(message: str) -> None:
    raise ConfigError(message)


def _overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Hydra overrides that set and those that delete. A plain `a.b=1` becomes `++a.b=1`, because Hydra would stop at
    the first unknown key with a message of its own; `build` reports all of them, with the mend."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, setting, deleting, problems = OverridesParser.create(), [], [], []
    for word in words:
        key, _, value = word.partition("=")
        if value.startswith("~/") and "'" not in value:
            word = f"{key}='{value}'"  # a home folder, which Hydra's grammar takes in quotes only
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(
                f"{word}: not key=value in Hydra's grammar ({reason}); quote values with spaces, commas or = "
                "as \"key='value'\""
            )
            continue
        if override.is_sweep_override():
            problems.append(f"{word}: several values; a list is written {key}=[{value}]")
        elif override.key_or_group.startswith("hydra."):
            problems.append(
                f"{override.key_or_group}: hybridrl makes no Hydra output folders; trainer.default_local_dir "
                "names the run folder"
            )
        elif override.is_delete():
            deleting.append(word)
        else:
            setting.append("++" + word.lstrip("+"))
    if problems:
        raise ConfigError(*problems)
    return setting, deleting


def _source(options: argparse.Namespace, config_name: str) -> tuple[str, Path]:
    """The YAML file's name and the folder to look in first."""
    name = (options.config_name or config_name).removesuffix(".yaml").removesuffix(".yml")
    packaged = Path(hybridrl.config_dir()).resolve()
    if options.config_dir is None:
        return name, packaged
    folder = Path(options.config_dir).expanduser().resolve()
    if name in compat_verl.CONFIG_NAMES and not (folder / f"{name}.yaml").is_file():
        return name, packaged  # verl's scripts pass --config-path=config, a folder of verl's own
    if not folder.is_dir():
        _fail(f"--config-dir={options.config_dir}: there is no such folder")
    return name, folder


def _compose(
    cls: type, name: str, folder: Path, overrides: list[str], on_defaults: bool, resolved: bool = True
) -> dict:
    """Hydra's composition: the tree of defaults, the file called name, then the overrides."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    packaged = Path(hybridrl.config_dir()).resolve()
    store = ConfigStore.instance()
    store.store(name="hybridrl_defaults", node=tree_of(cls()) if on_defaults else {})
    for alias in compat_verl.CONFIG_NAMES:
        store.store(name=alias, node={})
    store.store(name="hybridrl_root", node={"defaults": ["hybridrl_defaults", f"{name}@_global_", "_self_"]})
    search = [] if folder == packaged else [f"hydra.searchpath=['file://{packaged}']"]
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose("hybridrl_root", overrides=search + overrides)
        return OmegaConf.to_container(composed, resolve=resolved, throw_on_missing=resolved)
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, MissingConfigException) and f"'{name}'" in lines[0]:
            _fail(
                f"--config-name={name}: no {name}.yaml in {' or '.join(dict.fromkeys(map(str, (folder, packaged))))}; "
                f"there are {', '.join(_names(folder, packaged))}"
            )
        raise ConfigError(" ".join(lines[:2])) from None
    except Exception as error:  # YAML's own errors have no common base with the others
        import yaml

        if isinstance(error, yaml.YAMLError):
            raise ConfigError(f"--config-name={name}: not readable as YAML: {' '.join(str(error).split())}") from None
        raise


def _names(*folders: Path) -> list[str]:
    found = {str(path.relative_to(folder).with_suffix("")) for folder in folders for path in folder.rglob("*.yaml")}
    return sorted(found)


def _flatten(tree: dict, cls: type) -> dict[str, Any]:
    """Dotted keys to values: whole values at the leaves of cls, and down to the last dict at keys it does not know."""
    table, flat = leaves(cls), {}

    def walk(value: Any, path: str) -> None:
        if path not in table and isinstance(value, dict) and (value or not path):
            for name, below in value.items():
                walk(below, f"{path}.{name}" if path else str(name))
        elif path in table or value != {}:
            flat[path] = value

    walk(tree, "")
    return flat


def _unknown_key(name: str, value: Any, cls: type) -> str:
    table = list(leaves(cls))
    if any(leaf.startswith(f"{name}.") for leaf in table):
        return (
            f"{name}={value!r}: is a group of keys, such as"
            f" {next(leaf for leaf in table if leaf.startswith(f'{name}.'))}"
        )
    last = name.rsplit(".", 1)[-1]
    near = [leaf for leaf in table if leaf.endswith(f".{name}")]
    near += difflib.get_close_matches(name, [leaf for leaf in table if leaf.endswith(f".{last}")], n=3, cutoff=0.0)
    near += difflib.get_close_matches(name, table, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(list(dict.fromkeys(near))[:3])}?" if near else "--help lists every key"
    return f"{name}: unknown key; {hint}"


def _coerce(name: str, value: Any, item: Any) -> Any:
    """The value in the leaf's type, or ConfigError. int passes for float, 1e3 for int, one file for a list of files."""
    kind, nullable = inner_type(item)
    if value is None and nullable:
        return None
    wrong = ConfigError(f"{name}={value!r}: must be {kind_of(item)}" + _quote_hint(value, kind))
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise wrong
        return value
    if origin is list:
        value = [value] if isinstance(value, str) and get_args(kind)[0] is str else value
        if not isinstance(value, list):
            raise wrong
        return [_scalar(part, get_args(kind)[0], wrong) for part in value]
    return _scalar(value, kind, wrong)


def _scalar(value: Any, kind: type, wrong: ConfigError) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise wrong
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # trainer.experiment_name=7
    if type(value) is not kind:
        raise wrong
    return value


def _quote_hint(value: Any, kind: Any) -> str:
    if isinstance(value, str) and value.lower() == "none":
        return "; nothing is written null"
    if kind is str:
        return "; quote it to make it text, as \"key='value'\""
    if kind in (int, float, bool) and isinstance(value, str):
        return ", without quotes"
    return ""


def _fill(cls: type, values: dict[str, Any], prefix: str, explicit: frozenset[str]) -> Any:
    made = {}
    for item in fields(cls):
        if is_dataclass(item.type):
            made[item.name] = _fill(item.type, values, f"{prefix}{item.name}.", explicit)
        else:
            made[item.name] = explicit if item.name == "explicit" else values[prefix + item.name]
    return cls(**made)


def _print_help(cls: type, config_name: str) -> None:
    """Every key with its default and meaning, a table a group."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    entry = "hybridrl.trainer.main_ppo" if cls is PPOConfig else "hybridrl.trainer.main_sft"
    console.print(
        f"[bold]python -m {entry}[/] [--config-name {config_name}] [--config-dir FOLDER] [--cfg job] key=value ...",
        "key=value, +key=value, ++key=value, ~key (its default again); lists as \"key=['a','b']\", "
        'dicts as "key={a: 1}".',
        sep="\n",
    )
    groups: dict[str, list] = {}
    for name, item in leaves(cls).items():
        groups.setdefault(name.rsplit(".", 1)[0], []).append((name, item))
    for group, rows in groups.items():
        table = Table(title=f"[bold]{group}[/]", title_justify="left", box=None, padding=(0, 1), show_header=False)
        for column in ({"style": "cyan", "no_wrap": True}, {"style": "green", "overflow": "fold"}, {}):
            table.add_column(**column)
        for name, item in rows:
            value = default(item)
            shown = "null" if value is None else str(value)
            table.add_row(name, escape(shown), f"{escape(item.metadata['doc'])} [dim]({escape(kind_of(item))})[/]")
        console.print("", table)
