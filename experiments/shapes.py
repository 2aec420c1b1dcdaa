"""The default preset: rendered scenes, a random encoder, a small decoder. No download; minutes on two cores.

A random InceptionV3 distinguishes colours, textures, sizes and outlines, best in its early blocks. At 160 pixels
`mixed0` has a 17x17 grid, which is pooled to 8x8. Captions say what is left of what. The receptive field of `mixed0` is
too small to show where in the image a feature is, so the decoder learns an embedding of each position.
"""

from flaxcap.config import Config, Decode, Encoder, Model, Train


def get_config() -> Config:
    return Config(
        dataset="shapes",
        encoder=Encoder(weights="random", block="mixed0", image_size=160, shard_images=1000),
        model=Model(image_dim=192, positions=True, embedding_dim=64, attention_dim=128, hidden_dim=256, head_dim=128),
        # Small batches make many steps, because `left of` is learned late. The average is as good as two more epochs.
        train=Train(batch_images=8, epochs=6, learning_rate=1e-3, ema=0.998, num_buckets=4, log_every=50),
        decode=Decode(max_length=24),
    )
