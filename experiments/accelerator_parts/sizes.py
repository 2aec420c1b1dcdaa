"""The sizes of the measurements: those of COCO, and tiny ones that run the same code on a CPU."""

import dataclasses
import shutil
import tempfile
from typing import Any, NamedTuple

import jax

from flaxcap.config import Config, Data, Encoder, Model, Train
from flaxcap.encoders import base as encoders
from flaxcap.features import store
from flaxcap.runtime import device_memory


class Sizes(NamedTuple):
    """Sizes of all measurements."""

    images: int  # resident on the device
    stored: int  # in the store that training streams
    scored: int  # whose captions self-critical training counts
    compared: int  # in the batch whose gradients are compared
    batches: dict[int, int]  # of training; the key is the size in a measurement's name
    decoded: tuple[int, ...]
    threads: tuple[int, ...]  # that decode JPEG files
    photographs: int
    steps: int  # timed at the batch size 1,024
    repeats: int
    products: tuple[tuple[int, int, int], ...]  # matrix products; (): the benchmark's own
    config: Config


FULL = Sizes(
    images=113_287,  # Karpathy's training images
    stored=8192,
    scored=5120,
    compared=64,
    batches={256: 256, 1024: 1024, 2048: 2048},
    decoded=(64, 256, 1024, 4096),
    threads=(4, 8, 16),
    photographs=64,
    steps=32,
    repeats=3,
    products=(),
    # Four lengths instead of eight: each is a compilation. They pad 27% instead of 22% of the tokens.
    config=Config(train=Train(num_buckets=4)),
)
TINY = Sizes(
    images=32,
    stored=16,
    scored=16,
    compared=2,
    batches={256: 4, 1024: 8, 2048: 16},
    decoded=(2, 4),
    threads=(1, 2),
    photographs=4,
    steps=2,
    repeats=1,
    products=((64, 32, 16),),
    config=Config(
        data=Data(vocab_size=40, max_length=12),
        encoder=Encoder(block="mixed0", image_size=83, batch_size=2, shard_images=8),
        model=Model(image_dim=8, embedding_dim=8, attention_dim=8, hidden_dim=8, head_dim=8),
        train=Train(num_buckets=1, steps_per_dispatch=2),
    ),
)


def changed(config: Config, **fields: Any) -> Config:
    """Returns a copy of the configuration with other fields: `train__dtype="bfloat16"`."""
    for name, value in fields.items():
        group, _, field = name.partition("__")
        part = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group: part})
    return config


def resident(sizes: Sizes) -> int:
    """Returns the images that fit into half of a device's memory."""
    return min(sizes.images, device_memory.capacity(jax.local_devices()) // 2 // _bytes_an_image(sizes.config))


def on_disk(sizes: Sizes) -> int:
    """Returns the images that fit into half of the free disk."""
    return min(sizes.stored, shutil.disk_usage(tempfile.gettempdir()).free // 2 // _bytes_an_image(sizes.config))


def _bytes_an_image(config: Config) -> int:
    encoder = encoders.make(config.encoder)
    return store.bytes_an_image(encoder.positions, encoder.features, config.encoder.store_dtype)
