"""The user's own data set: a folder of images and captions."""

import pathlib
import re

import tensorflow_datasets as tfds

from flaxcap.data.base import DataError
from flaxcap.data.layout_builder import LayoutBuilder
from flaxcap.data.layouts import detect


class FolderBuilder(LayoutBuilder):
    """A folder (`manual_dir`) of images and captions in one of the layouts of docs/data.md.

    Images are named as the captions name them, or by their paths below the folder where each split has a folder.
    image/id is the captions file's, or numbers the images from 0 in the order of the file. `split_by_name` makes the
    splits if the captions name none, or only train.

    The prepared copy's path contains the folder's name.
    """

    name = "folder"
    VERSION = tfds.core.Version("1.0.0")
    layouts = detect.LAYOUTS

    def __init__(self, *, manual_dir, **kwargs):
        if manual_dir is None:
            raise DataError("--manual_dir: found none, expected the folder of images and captions")
        folder = pathlib.Path(manual_dir).expanduser()
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.resolve().name) or "root"
        super().__init__(manual_dir=folder, variant=name, **kwargs)
