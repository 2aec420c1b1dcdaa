"""Flickr8k (Hodosh, Young and Hockenmaier 2013), from its authors, Karpathy or Kaggle."""

from collections.abc import Iterator

import tensorflow_datasets as tfds

from flaxcap.data.base import DataError
from flaxcap.data.layout_builder import LayoutBuilder
from flaxcap.data.layouts import detect


class Flickr8kBuilder(LayoutBuilder):
    """Flickr8k: 8,000 photographs of people and dogs, five captions each.

    `manual_dir` holds one of

    - the authors' `Flickr8k.token.txt` and their lists of images: `Flickr_8k.trainImages.txt`, and
      `Flickr_8k.devImages.txt` and `Flickr_8k.testImages.txt`, which may be missing. Captions of images in no list
      are left out;
    - Karpathy's `dataset_flickr8k.json`;
    - Kaggle's `captions.txt`, which has no splits;

    and the images in `Images/` or `Flicker8k_Dataset/`. image/id numbers the images from 0 in the order of the token
    file, or is Karpathy's imgid.
    """

    name = "flickr8k"
    VERSION = tfds.core.Version("1.0.0")
    layouts = detect.FLICKR8K

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        if self.manual_dir is None:
            names = ", ".join(layout.name for layout in self.layouts)
            raise DataError(f"--manual_dir: found none, expected the directory of the images and of {names}")
        return super()._split_generators(dl_manager)
