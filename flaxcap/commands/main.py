"""The `flaxcap` program: parses the command line, runs the command, and turns errors into exit statuses."""

import errno
import importlib
import io
import os
import sys
import types
from collections.abc import Sequence

import absl.flags
from absl import logging

import flaxcap
from flaxcap.commands import FAILED, INTERRUPTED, from_flags
from flaxcap.commands import flags as flags_lib
from flaxcap.errors import UserError, nearest, plain

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_OUTPUTS = ("workdir", "data_dir", "out", "out_dir")


def run() -> None:
    """Runs the command line of this process and exits."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a caption's letters
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe: Python's own flush at exit would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    except KeyboardInterrupt:
        print("flaxcap: interrupted; the same command resumes from what was saved", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def main(args: Sequence[str]) -> int:
    """Runs a command line, given without the program's name, and returns its exit status."""
    if args and args[0] == "help":
        args = [*args[1:2], "--help"]
    if not args or args[0] in ("--help", "-h"):
        print(flags_lib.overview())
        return 0
    if args[0] == "--version":
        print(f"flaxcap {flaxcap.__version__}")
        return 0
    command, *rest = args
    if command not in flags_lib.COMMANDS:
        hint = nearest(command, flags_lib.COMMANDS)
        print(f"flaxcap: unknown command {command!r} (`flaxcap --help` lists them){hint}", file=sys.stderr)
        return FAILED
    values = absl.flags.FlagValues()
    flags_lib.define(command, values)
    if {"--help", "-h", "-help"} & set(rest):
        print(flags_lib.help_text(command, values))
        return 0
    flags = types.SimpleNamespace()
    try:
        overrides = [argument for argument in rest if argument.startswith(("--config.", "-config."))]
        positional = values(["flaxcap", *(argument for argument in rest if argument not in overrides)])[1:]
        flags = types.SimpleNamespace(**values.flag_values_dict())
        _check(command, values, positional)
        return _run(command, flags, overrides, positional)
    except absl.flags.UnrecognizedFlagError as e:
        print(plain(f"flaxcap {command}: {e}{flags_lib.elsewhere(command, e.flagname)}"), file=sys.stderr)
    except (UserError, absl.flags.Error) as e:
        print("\n".join(map(plain, f"flaxcap {command}: {e}".split("\n"))), file=sys.stderr)
    except OSError as e:
        if e.filename is None and e.errno not in _DISK:
            raise
        # Python's error of a write to an open file has no file name: any output may be meant.
        outputs = [f"--{name}={path}" for name in _OUTPUTS if (path := getattr(flags, name, None))]
        print(plain(f"flaxcap {command}: {e.filename or ' or '.join(outputs)}: {e.strerror}"), file=sys.stderr)
    return FAILED


def _check(command: str, values: absl.flags.FlagValues, positional: Sequence[str]) -> None:
    """Raises UserError for a positional argument of a command that takes none, and for a missing flag."""
    if positional and command not in ("caption", "bench"):
        raise UserError(f"unexpected {positional[0]!r}; values are given as --flag=value")
    for name in flags_lib.NEEDED.get(command, ()):
        if not values[name].value:
            raise UserError(f"--{name} is missing: {values[name].help}")


def _run(command: str, flags: types.SimpleNamespace, overrides: list[str], positional: list[str]) -> int:
    """Configures JAX, loads the preset, and runs the command's module. JAX is imported here at the earliest."""
    logging.set_verbosity(flags.verbosity)
    from flaxcap.runtime import devices

    devices.check_flax()
    if command not in ("export", "verify", "bench"):  # bench times compilations
        devices.keep_compiled(flags.compilation_cache_dir)
        if getattr(flags, "distributed", None):
            devices.join(flags.distributed)
    config = from_flags.preset(command, flags, overrides)
    return importlib.import_module(f"flaxcap.commands.{command}").run(flags, config, positional)
