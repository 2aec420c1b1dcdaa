"""COCO 2014 with Karpathy's split: 113,287 training images with five captions each, features of `mixed10`."""

from flaxcap.config import Config, Data, Train


def get_config() -> Config:
    return Config(
        dataset="coco_captions",
        data=Data(train_split="train+restval"),
        train=Train(batch_images=128, epochs=20, learning_rate=1e-3, warmup_steps=1000),
    )
