"""The preset and the captioner that a command's flags name."""

import dataclasses
import os
import types
from typing import TYPE_CHECKING

from flaxcap import presets
from flaxcap.config import Config, ConfigError, difference
from flaxcap.errors import UserError

if TYPE_CHECKING:
    from flaxcap.inference.captioner import Captioner


def preset(command: str, flags: types.SimpleNamespace, overrides: list[str]) -> Config:
    """Loads the preset of --config, or the one saved in the run or export, and applies the overrides.

    Args:
      command: the command's name.
      flags: its flags.
      overrides: arguments `--config.FIELD=VALUE`.

    Raises:
      UserError: no preset is named, or it cannot be used.
    """
    saved = getattr(flags, "model", None) or getattr(flags, "workdir", None)
    if flags.config:
        return presets.override(presets.load(flags.config), overrides, command, flags.config)
    if command in ("verify", "bench"):  # verify of a run alone needs no preset
        return presets.override(Config(), overrides, command)
    if saved:
        from flaxcap.inference import loading

        directory = saved if isinstance(saved, str) else saved[0]
        file = os.path.join(directory, "config.json")
        return presets.override(loading.read_config(directory), overrides, command, file)
    if getattr(flags, "predictions", None):
        raise UserError("no data set is named: give --config=PRESET")
    raise UserError("no model is named: give --workdir=RUN or --model=EXPORT")


def captioner(flags: types.SimpleNamespace, config: Config) -> "Captioner":
    """Loads the captioner of --model or --workdir, and gives it the preset.

    Args:
      flags: the command's flags.
      config: the preset with overrides.

    Raises:
      ConfigError: an override changes a field that the trained parameters depend on.
    """
    from flaxcap.encoders.base import IMPORTED
    from flaxcap.inference import loading

    workdirs = [flags.workdir] if isinstance(flags.workdir, str) else flags.workdir
    found = loading.load_ensemble(workdirs=workdirs, model_dirs=getattr(flags, "model", []), data_dir=flags.data_dir)
    if found.config.encoder.name == IMPORTED:  # a preset of the user names the encoder that it would have
        config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, name=IMPORTED))
    if changed := difference(found.config, config, "model"):
        raise ConfigError(f"the model was trained with another preset: {'; '.join(changed)}")
    return dataclasses.replace(found, config=config)
