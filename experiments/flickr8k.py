"""Flickr8k with its official splits: 6,000 training photographs with five captions each, features of `mixed10`."""

from flaxcap.config import Config, Data, Train


def get_config() -> Config:
    return Config(
        dataset="flickr8k",
        data=Data(vocab_size=3000, max_length=40),
        train=Train(batch_images=32, epochs=10, learning_rate=5e-4, warmup_steps=200),
    )
