"""flaxcap: a high-throughput trainer for attention image captioners, in JAX, and the captioner that comes out of it.

    import flaxcap

    captioner = flaxcap.load("coco-captioner")      # a run or an export
    captioner.caption("photo.jpg").text

`load`, `Captioner`, `Config`, `prepare`, `train` and `evaluate` are imported at first use: `import flaxcap` does not
import JAX.

Shape letters, used in array names (`feats_IPF`, `tokens_ICT`), einsums and docstrings:

    I  images in a batch               E  embedding width
    C  captions an image               H  hidden (recurrent state) width
    B  captions in a batch, I·C        A  attention width
    P  positions of the grid, 8·8      T  time: tokens in a caption
    F  feature width of the encoder    V  vocabulary
    N  rows of a store or data set     Y, X  image height, width
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxcap.commands.evaluate import evaluate
    from flaxcap.commands.prepare import prepare
    from flaxcap.commands.train import train
    from flaxcap.config import Config
    from flaxcap.inference.captioner import Captioner
    from flaxcap.inference.loading import load

__version__ = "0.1.0"
__all__ = ["Captioner", "Config", "evaluate", "load", "prepare", "train"]

_OWNERS = {
    "Captioner": "flaxcap.inference.captioner",
    "Config": "flaxcap.config",
    "evaluate": "flaxcap.commands.evaluate",
    "load": "flaxcap.inference.loading",
    "prepare": "flaxcap.commands.prepare",
    "train": "flaxcap.commands.train",
}


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'flaxcap' has no attribute {name!r}")
    return getattr(importlib.import_module(_OWNERS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OWNERS])
