"""The sizes of TensorFlow's tutorial "image captioning with visual attention" (its original, InceptionV3 form).

Equal: 6,000 of COCO's training images, 80% of them for training and 20% for validation; 5,000 words; InceptionV3's
8x8x2048 grid; Dense(256) with relu; additive attention of 512; embedding 256; GRU 512; two dense layers; batches of 64
captions; Adam with a learning rate of 0.001; 20 epochs; one padded length.

Different, because the tutorial has a mistake:
- The GRU keeps its state from word to word. The tutorial calls it without its state, so each word depends only on the
  last one.
- The loss is the mean over real tokens. The tutorial averages over padding, too.
- The vocabulary comes from the training captions. The tutorial's includes words of the validation captions.
- Captions are greedy. The tutorial samples among the 40 most probable words
  (`--config.decode.method=sample --config.decode.top_k=40`).

Different, because flaxcap is built differently:
- A batch is 64 images with one caption each. The tutorial draws captions, so an image may occur twice in a batch.
- The 6,000 images are the first ones of the annotation file. The tutorial draws them.
- Images are resized with antialiasing, and features are stored as bfloat16.
- The GRU's recurrent weights start orthogonal, Keras's default. The tutorial draws them Glorot-uniform.
- Captions longer than 50 tokens are cut. The tutorial pads to its longest caption, 49 tokens.
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
