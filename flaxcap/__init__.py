"""flaxcap: a high-throughput trainer for attention image captioners, in JAX, and the captioner that comes out of it.

    import flaxcap

    captioner = flaxcap.load("coco-captioner")      # a run or an export
    captioner.caption("photo.jpg").text

`load`, `Captioner`, `Config`, `prepare`, `train` and `evaluate` are imported at first use: `import flaxcap` does not
import JAX.

The capital letters at the end of a name are the array's axes, in order: `feats_IPF` is `[I, P, F]`. They are also the
letters of einsums. A digit is a fixed size: `images_IYX3`. A letter has one meaning, and one source of its size:

    I     images in a batch                      train.batch_images, decode.batch_size; a device has a part
    C     captions an image                      train.captions_per_image; in decoding the K hypotheses
    B     captions of all images, I·C            in decoding I·K
    J     batches in a dispatch                  train.steps_per_dispatch
    P     positions of an image                  the store
    F     feature width                          the store
    D     width that features are projected to   model.image_dim
    E     word embedding width                   model.embedding_dim
    H     hidden width                           model.hidden_dim
    A     attention width                        model.attention_dim
    G     width of all gates                     3·H for model.cell="gru", 4·H for "lstm"
    R     width of the recurrent product         A + G
    S     width of a decoder's states            H, or H + D + E for model.output="deep"
    T     time: tokens of a caption              the longest caption of a batch; decode.max_length
    V     vocabulary                             the store; decoding pads it to a multiple of 32
    K     hypotheses an image, in decoding       decode.beam_width; in sampling the captions
    M     tokens of all captions, flattened      T·I·C; losses pack them to fewer
    N     rows of a store or data set            the store; a device has a part
    L     batches in an epoch                    U / I, rounded up
    U     entries                                an entry is an image with at most C of its captions
    Y, X  image height, width                    the encoder's Preprocess
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
