"""Exports: a captioner in a directory that needs nothing else.

config.json  vocabulary.json  about.json   preset; words; origin, preprocessing, checksums
decoder/  encoder/                         parameters (Orbax)
"""

import json
import re

from etils import epath

from flaxcap import presets
from flaxcap.files import integrity
from flaxcap.files.params import CheckpointError, save_params
from flaxcap.inference.captioner import Captioner

PARAMS = ("decoder", "encoder")  # directories of an export


def write(captioner: Captioner, out: epath.PathLike) -> None:
    """Writes an export. An ensemble's other members are left out.

    Args:
      captioner: what to export.
      out: a new directory, or one that holds an interrupted export.

    Raises:
      CheckpointError: `out` holds something else, or cannot be written.
    """
    path = epath.Path(out)
    ours = re.compile(rf"\.?({'|'.join((*PARAMS, 'vocabulary', 'about'))})(\.json)?(\.part|\.orbax-checkpoint-tmp.*)?")
    if path.exists() and (not path.is_dir() or not all(ours.fullmatch(file.name) for file in path.iterdir())):
        raise CheckpointError(f"--out={out}: not empty; an export goes to a new directory")
    path.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, params in zip(PARAMS, (captioner.params, captioner.encoder_params), strict=True):
        if params is not None:
            save_params(path / name, params)
            checksums = f"{name}/{integrity.CHECKSUMS}"  # of all files of the directory
            files[checksums] = integrity.Checksum.of_file(path / checksums).sha256
    about = json.dumps(captioner.about | {"files": files}, indent=2) + "\n"
    integrity.write_atomically(path / "vocabulary.json", captioner.vocabulary.to_json())
    integrity.write_atomically(path / "about.json", about)
    # The last file: an export with a config.json is complete.
    integrity.write_atomically(path / "config.json", presets.to_json(captioner.config))
