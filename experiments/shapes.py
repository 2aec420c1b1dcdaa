"""The default: rendered scenes, a random encoder, a small decoder. No download; minutes on two cores.

A random InceptionV3 still tells colours, textures, sizes and outlines apart, best at its early blocks. At
160 pixels `mixed0` has a 17x17 grid, which is pooled to 8x8.
"""

from flaxcap.config import Config, Data, Decode, Encoder, Model, Shapes, Train


def get_config() -> Config:
    return Config(
        dataset="shapes",
        data=Data(shapes=Shapes(num_train=4000, num_val=200, num_test=300)),
        encoder=Encoder(weights="random", block="mixed0", image_size=160, shard_images=500),
        model=Model(image_dim=192, embedding_dim=64, attention_dim=128, hidden_dim=256, head_dim=128),
        train=Train(batch_images=64, epochs=16, learning_rate=2e-3),
        decode=Decode(max_length=24),
    )
