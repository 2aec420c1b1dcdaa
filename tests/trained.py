"""One small run, prepared and trained as users do it, for the tests that need a trained captioner."""

import pathlib
from typing import NamedTuple

from flaxcap import config as config_lib
from flaxcap import presets
from flaxcap.commands import prepare, train
from flaxcap.config import Config, Data, Decode, Encoder, Model, Shapes, Train


class Trained(NamedTuple):
    """A run: to be read, never written to."""

    config: Config
    data_dir: pathlib.Path
    workdir: pathlib.Path
    preset: pathlib.Path  # the same config as a file


def tiny_config() -> Config:
    """Rendered scenes, a random encoder, and a decoder that learns what a caption sounds like in a second."""
    return Config(
        dataset="shapes",
        data=Data(shapes=Shapes(num_train=32, num_val=8, num_test=8)),
        encoder=Encoder(weights="random", block="mixed0", image_size=160, batch_size=8, shard_images=20),
        model=Model(image_dim=16, embedding_dim=16, attention_dim=16, hidden_dim=32, head_dim=32),
        train=Train(
            batch_images=8,
            captions_per_image=1,
            epochs=2,
            learning_rate=2e-2,
            warmup_steps=5,
            num_buckets=1,
            log_every=8,
        ),
        decode=Decode(max_length=16, batch_size=8),
    )


def make(directory: pathlib.Path) -> Trained:
    """Prepares and trains it in `directory`."""
    config = config_lib.check(tiny_config())
    made = Trained(config, directory / "data", directory / "run", directory / "tiny.json")
    made.preset.write_text(presets.to_json(config))
    prepare.prepare(config, made.data_dir, num_workers=2)
    train.train(config, made.workdir, made.data_dir)
    return made
