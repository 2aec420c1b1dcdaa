"""The sizes of TensorFlow's tutorial "image captioning with visual attention" (its original, InceptionV3 form).

The same: 6,000 of COCO's training images, 80% of them to train and 20% to validate; 5,000 words; InceptionV3's
8x8x2048 grid; Dense(256) with relu; additive attention of 512; embedding 256; GRU 512; two dense layers; batches of 64
captions; Adam with a learning rate of 0.001; 20 epochs; one padded length.

Different, because the tutorial is wrong there:
- The GRU keeps its state from word to word. The tutorial calls it without, so that each word sees the last one only.
- The loss is the mean over real tokens. The tutorial averages over the padding too.
- The vocabulary is made of the training captions. The tutorial's holds the validation captions' words too.
- Greedy captions; the tutorial samples from the 40 best. (`--config.decode.method=sample --config.decode.top_k=40`)

Different, because flaxcap works otherwise:
- A batch is 64 images with a caption each: the tutorial draws captions, and may meet an image twice in a batch.
- The 6,000 images are the first of the annotation file, not a random choice.
- Pictures are resized with antialiasing, features are stored as bfloat16.
- Key, query and value projections have the tutorial's sizes; weights are drawn Glorot-uniform, as Keras does.
- Captions longer than 50 tokens are cut; the tutorial pads to its longest, 49.
"""

from flaxcap.config import Config, Data, Train


def get_config() -> Config:
    return Config(
        dataset="coco_captions",
        data=Data(train_split="train[:4800]", val_split="train[4800:6000]", test_split=""),
        train=Train(
            batch_images=64,
            captions_per_image=1,
            epochs=20,
            learning_rate=1e-3,
            warmup_steps=0,
            schedule="constant",
            clip_norm=0,
            num_buckets=1,
        ),
    )
