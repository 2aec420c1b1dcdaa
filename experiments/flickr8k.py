"""Flickr8k with its official splits: 6,000 training photographs with five captions each, features of `mixed10`.

On a data set this small, regularisation (dropout, label smoothing, averaged parameters) matters more than the size of
the decoder. README.md has the scores, and sweep.py measures each option.
"""

from flaxcap.config import Config, Data, Decode, Dropout, Model, Train


def get_config() -> Config:
    return Config(
        dataset="flickr8k",
        data=Data(vocab_size=3000, max_length=40),
        model=Model(image_dim=512, initial_state="mean", output="deep"),
        train=Train(
            batch_images=32,
            epochs=10,
            learning_rate=2e-3,
            warmup_steps=200,
            label_smoothing=0.1,
            ema=0.99,
            dropout=Dropout(image=0.3, embedding=0.3, output=0.5, recurrent=0.2),
            cider_epochs=8,
            cider_learning_rate=2e-4,
            cider_temperature=0.7,  # at 1, words are drawn that only label smoothing makes probable
        ),
        decode=Decode(method="beam", max_length=22, beam_width=3, length_penalty=0.7, batch_size=32),
    )
