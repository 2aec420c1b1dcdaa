"""Presets in files, and their overrides on the command line.

A preset is a Python file with a `get_config()` that returns a `Config`, or the JSON file beside a run or an export.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import re
import traceback
import typing
from collections.abc import Callable, Sequence

from absl import flags
from etils import epath

from flaxcap.config import Config, ConfigError, check
from flaxcap.errors import cut, nearest, quoted
from flaxcap.fields import flatten
from flaxcap.files import size_limits


def load(path: str) -> Config:
    """Loads the preset of a `.py` file with `get_config()`, or of a saved `config.json`. Bounds are not checked.

    Raises:
      ConfigError: the file is missing, is not a preset, or has an unknown field or a value of the wrong type.
    """
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError(f"--config={path}: no such file; presets are experiments/NAME.py")
    if path.endswith(".json"):
        try:
            tree = json.loads(size_limits.read(file, size_limits.PRESET))
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{path}: not JSON ({e})") from e
        return from_dict(tree, path)
    spec = importlib.util.spec_from_file_location(file.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path}: a preset is a .py or a .json file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as e:  # a preset is a program: it may raise anything
        raise ConfigError(f"--config={path}: {_what_failed(e, path)}") from e
    if config is None:
        raise ConfigError(f"--config={path}: has no get_config()")
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() gave {type(config).__name__}, not flaxcap.config.Config")
    return from_dict(dataclasses.asdict(config), path)


def _what_failed(error: Exception, path: str) -> str:
    """Describes an error inside a preset: its line, and the field that was probably meant."""
    file = os.path.abspath(path)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    hint = nearest(unknown[1], flatten(Config())) if unknown else ""
    message = str(error).partition(". Did you mean")[0]  # Python 3.13 knows the field, but not its group
    return f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {message}{hint}"


def to_json(config: Config) -> str:
    """Returns the preset as text that `load` reads from a `.json` file."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(tree: object, where: str, cls: type = Config):
    """Returns the preset, or the group of one, that a parsed JSON tree describes. Missing fields keep their defaults.

    Args:
      tree: the parsed JSON.
      where: the file and the groups that contain `tree`, for error messages.
      cls: the dataclass to return.

    Raises:
      ConfigError: a field is unknown or its value has the wrong type.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: found {type(tree).__name__}, expected an object")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        if name not in hints:
            raise ConfigError(f"{where}: unknown field {quoted(name)}{nearest(name, hints)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = from_dict(value, f"{where}: {name}", typing.cast(type, hint))
            continue
        if hint is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not hint:
            raise ConfigError(f"{where}: {name} is {quoted(value)}, expected {hint.__name__}")
        values[name] = value
    return cls(**values)


# Parses the text of an override by the field's type; the text says what is expected.
_PARSERS: dict[type, tuple[Callable[[str], typing.Any], str]] = {
    int: (flags.IntegerParser().parse, "a whole number"),
    float: (float, "a number"),
    bool: (flags.BooleanParser().parse, "true or false"),
    str: (str, "text"),
}


def override(config: Config, arguments: Sequence[str], command: str, file: str | None = None) -> Config:
    """Returns a copy of the preset with the overrides of a command line applied, and checks it.

    Args:
      config: the preset; it stays unchanged.
      arguments: `--config.FIELD=VALUE`, or `--config.FIELD` to set a bool field. The last one of a field counts.
      command: the command whose `--help` lists the fields, for error messages.
      file: the file that the preset came from; errors in fields without an override name it.

    Raises:
      ConfigError: a field is unknown, its value has the wrong type, `check` refuses the preset, or an overridden field
        has no effect in it.
    """
    config = copy.deepcopy(config)
    known = flatten(config)
    names = []
    for argument in arguments:
        name, equals, text = argument.lstrip("-").removeprefix("config.").partition("=")
        if name not in known:
            within = [field for field in known if field.startswith(f"{name}.")]
            hint = f"; it is a group, as in {within[0]!r}" if within else nearest(name, known)
            raise ConfigError(f"--config.{name}: no such field (`flaxcap {command} --help` lists them){hint}")
        parse, expected = _PARSERS[known[name].type]
        if not equals and known[name].type is not bool:
            raise ConfigError(f"--config.{name}: expected --config.{name}=VALUE, where VALUE is {expected}")
        try:
            value = parse(text) if equals else True
        except ValueError:
            raise ConfigError(f"--config.{name}={cut(text)}: expected {expected}") from None
        *groups, last = name.split(".")
        setattr(functools.reduce(getattr, groups, config), last, value)
        names.append(name)
    try:
        check(config)
    except ConfigError as e:
        overridden = any(str(e).startswith(f"--config.{name}") for name in names)
        raise e if overridden or not file else ConfigError(f"{file}: {e}") from e
    _check_used(config, names)
    return config


def _check_used(config: Config, names: Sequence[str]) -> None:
    """Raises ConfigError if one of the fields with these full names has no effect in the preset."""
    fields = flatten(config)
    for name in names:
        for condition in fields[name].only:
            found = fields[condition.name].value
            if not condition.holds(found):
                wanted = condition if condition.value else f"{condition} to be set"
                raise ConfigError(
                    f"--config.{name}={cut(str(fields[name].value))}: has no effect,"
                    f" found {condition.name}={quoted(found) if found == '' else found}, expected {wanted};"
                    f" set --config.{condition.name} too, or leave --config.{name} out"
                )
