"""`flaxcap export`: a trained captioner as a directory that needs nothing else."""

import types

from flaxcap.commands import from_flags
from flaxcap.config import Config
from flaxcap.inference import export


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap export` and returns its exit status."""
    export.write(from_flags.captioner(flags, config), flags.out)
    print(f"exported to {flags.out}")
    return 0
