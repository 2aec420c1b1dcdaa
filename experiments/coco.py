"""COCO 2014 with Karpathy's split: 113,287 training images with five captions each, features of `mixed10`.

Not yet run. README.md has the scores to expect.
"""

from flaxcap.config import Config, Data, Decode, Dropout, Model, Train


def get_config() -> Config:
    return Config(
        dataset="coco_captions",
        # About 10,000 words occur five times in the training captions.
        data=Data(train_split="train+restval", vocab_size=10_000, max_length=40),
        model=Model(image_dim=512, embedding_dim=512, hidden_dim=1024, initial_state="mean", output="deep"),
        train=Train(
            batch_images=128,
            epochs=15,
            learning_rate=1e-3,
            warmup_steps=1000,
            label_smoothing=0.1,
            ema=0.999,
            dropout=Dropout(image=0.1, embedding=0.1, output=0.5),
            cider_epochs=10,
            cider_temperature=0.7,  # at 1, words are drawn that only label smoothing makes probable
        ),
        decode=Decode(method="beam", max_length=22, beam_width=3, length_penalty=0.7, batch_size=128),
    )
