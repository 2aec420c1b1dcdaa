"""The default: rendered scenes, a random encoder, a small decoder. No download; minutes on two cores.

A random InceptionV3 still tells colours, textures, sizes and outlines apart, best at its early blocks. At
160 pixels `mixed0` has a 17x17 grid, which is pooled to 8x8. Its features see too little to know where in the
picture they are, and captions tell what is left of what: hence the learned positions.
"""

from flaxcap.config import Config, Decode, Encoder, Model, Train


def get_config() -> Config:
    return Config(
        dataset="shapes",
        encoder=Encoder(weights="random", block="mixed0", image_size=160, shard_images=1000),
        model=Model(image_dim=192, positions=True, embedding_dim=64, attention_dim=128, hidden_dim=256, head_dim=128),
        # Many small steps: what is left of what is learned late. The average is as good as two epochs more.
        train=Train(batch_images=8, epochs=6, learning_rate=1e-3, ema=0.998, num_buckets=4, log_every=50),
        decode=Decode(max_length=24),
    )
