"""The preset: typed dataclasses whose fields declare their default, help text, bounds and identity.

The command line overrides fields (`--config.train.epochs=3`). presets.py reads and writes presets.
"""

import dataclasses
from typing import Any

from flaxcap.errors import UserError, cut
from flaxcap.fields import Identity, field, flatten, group


class ConfigError(UserError):
    """A preset, or a field of one, that cannot be used."""


@dataclasses.dataclass
class Shapes:
    """Sizes and seed of the rendered data set `shapes`."""

    num_train: int = field(10_000, "rendered training images", least=1)
    num_val: int = field(300, "rendered validation images, each with a held-out kind of object", least=1)
    num_test: int = field(300, "rendered test images, each with a held-out kind of object", least=0)
    seed: int = field(0, "seed of the rendered scenes", least=0, most=2**32 - 1)


@dataclasses.dataclass
class Data:
    """Splits and limits of the data set, and its text."""

    train_split: str = field("train", "TFDS split to train on, such as train+restval", nonempty="the name of a split",
                              identity=("store",))  # fmt: skip
    val_split: str = field("val", "TFDS split that selects the best checkpoint", nonempty="the name of a split",
                            identity=("store",))  # fmt: skip
    test_split: str = field("test", "TFDS split for the final scores; empty: none", identity=("store",))
    max_images: int = field(0, "most images of each split; 0: all", least=0, identity=("store",))
    max_captions: int = field(0, "most captions of each split; 0: all", least=0, identity=("store",))
    tokenizer: str = field("words", "tokens of captions: words; characters, in scripts without spaces between words;"
                            " or bpe, pieces of words that are learned from the training captions",
                            choices=("words", "characters", "bpe"), identity=("model",))  # fmt: skip
    vocab_size: int = field(5000, "tokens in the vocabulary: the most frequent ones of the training captions", least=1,
                             identity=("model",))  # fmt: skip
    max_length: int = field(50, "most tokens of a caption, <start> and <end> included; longer captions are cut",
                             least=3, most=10_000, identity=("model",))  # fmt: skip
    shapes: Shapes = group(Shapes, "the rendered data set `shapes`", identity=("store",), only="dataset=shapes")


@dataclasses.dataclass
class Encoder:
    """The network that turns images into features, and the storage of these features."""

    name: str = field("inception_v3", "the image encoder", identity=("store", "model"))
    weights: str = field("imagenet", "imagenet (downloaded once), random, or the path of a file of weights",
                          identity=("store", "model"))  # fmt: skip
    block: str = field("", "the encoder's block that outputs the features, such as mixed8; empty: its last",
                        identity=("store", "model"))  # fmt: skip
    image_size: int = field(0, "side in pixels that images are resized to; 0: the encoder's own", least=0, most=4096,
                             identity=("store", "model"))  # fmt: skip
    dtype: str = field("float32", "arithmetic of the encoder", choices=("float32", "bfloat16"), identity=("store",))
    store_dtype: str = field("bfloat16", "type of the stored features", choices=("float32", "bfloat16"),
                              identity=("store",))  # fmt: skip
    batch_size: int = field(0, "images in a forward pass; 0: for each device, 2 on a CPU (fastest there), else 64",
                             least=0, most=1 << 16)  # fmt: skip
    shard_images: int = field(1024, "images in a file of features; prepare resumes at the first unfinished file",
                               least=1)  # fmt: skip
    seed: int = field(0, "seed of random weights", least=0, most=2**32 - 1, identity=("store", "model"),
                       only="encoder.weights=random")  # fmt: skip


@dataclasses.dataclass
class Model:
    """Architecture of the caption decoder."""

    name: str = field("recurrent", "the caption decoder")
    image_dim: int = field(256, "width that features are projected to", least=1, most=1 << 16)
    positions: bool = field(False, "add a learned position embedding to each projected feature")
    embedding_dim: int = field(256, "width of word embeddings", least=1, most=1 << 16)
    attention_dim: int = field(512, "width of the additive attention", least=1, most=1 << 16)
    hidden_dim: int = field(512, "width of the recurrent state", least=1, most=1 << 16)
    head_dim: int = field(512, "width of the first of the two output layers", least=1, most=1 << 16)
    cell: str = field("gru", "recurrent cell", choices=("gru", "lstm"))
    attention_gate: bool = field(False, "scale the context by a learned gate (Show, Attend and Tell, 4.2.1)")
    initial_state: str = field("zeros", "initial recurrent state: zeros, or projected from the mean image feature",
                                choices=("zeros", "mean"))  # fmt: skip
    attention: str = field("soft", "context: the weighted sum over positions (soft), or in training one position drawn"
                            " by the weights, learned by REINFORCE (hard; Xu et al. 2015, 4.1)",
                            choices=("soft", "hard"))  # fmt: skip
    output: str = field("state", "input of the output layers: the state, or also the context and the last word (deep;"
                         " Show, Attend and Tell, equation 7)", choices=("state", "deep"))  # fmt: skip
    tied: bool = field(False, "the last layer shares the embedding's weights; embedding_dim equals head_dim")
    embeddings: str = field("", "text file of word vectors (GloVe's format) that initialise the embedding; empty:"
                             " random")  # fmt: skip


@dataclasses.dataclass
class Dropout:
    """Dropout rates. Each training step draws new masks."""

    image: float = field(0.0, "rate of the projected features", least=0, most=0.99)
    embedding: float = field(0.0, "rate of word embeddings", least=0, most=0.99)
    attention: float = field(0.0, "rate of the attention weights", least=0, most=0.99)
    recurrent: float = field(0.0, "rate of the recurrent state, one mask for all words of a caption"
                              " (arXiv:1512.05287)", least=0, most=0.99)  # fmt: skip
    output: float = field(0.0, "rate of the output layers' input", least=0, most=0.99)


@dataclasses.dataclass
class Finetune:
    """Fine-tuning of the encoder together with the decoder."""

    block: str = field("", "first block of the encoder to train; empty: none, training reads prepared features",
                        identity=("run",))  # fmt: skip
    learning_rate: float = field(1e-5, "peak learning rate of the encoder", above=0, only="train.finetune.block")
    flip: bool = field(True, "mirror half of the images", only="train.finetune.block")
    crop: float = field(0.8, "smallest share of an image's sides that a random crop keeps", above=0, most=1,
                         only="train.finetune.block")  # fmt: skip


@dataclasses.dataclass
class Train:
    """Batches, optimizer, regularisation and schedule of training."""

    batch_images: int = field(64, "images in a step, over all devices", least=1, identity=("run",))
    captions_per_image: int = field(5, "captions of an image in a step", least=1, identity=("run",))
    epochs: int = field(20, "passes over the training captions", least=0)
    learning_rate: float = field(1e-3, "peak learning rate of Adam", above=0, only="train.epochs")
    warmup_steps: int = field(100, "steps of linear warm-up", least=0, only="train.epochs")
    schedule: str = field("cosine", "learning rate after the warm-up: decay to 2% at the end of each stage, constant,"
                           " or times plateau_factor after each plateau_epochs without a better validation score",
                           choices=("cosine", "constant", "plateau"))  # fmt: skip
    plateau_epochs: int = field(2, "epochs without a better validation score that lower the learning rate", least=1,
                                 only="train.schedule=plateau")  # fmt: skip
    plateau_factor: float = field(0.5, "factor of the learning rate on a plateau", above=0, most=1,
                                   only="train.schedule=plateau")  # fmt: skip
    stop_after: int = field(0, "epochs without a better validation score that end the run; 0: none do", least=0)
    weight_decay: float = field(0.0, "decay of matrices, decoupled from the gradient and times the learning rate"
                                 " (AdamW)", least=0)  # fmt: skip
    ema: float = field(0.0, "decay of a moving average of the parameters, which is validated and kept; 0: no average",
                        least=0, below=1, identity=("run",))  # fmt: skip
    dropout: Dropout = group(Dropout, "rates of dropout", only="train.epochs")
    label_smoothing: float = field(0.0, "share of a target's probability that is spread over all words", least=0,
                                    below=1, only="train.epochs")  # fmt: skip
    doubly_stochastic: float = field(0.0, "weight of a regulariser: a caption's attention weights sum to 1 at each"
                                      " position", least=0, only="train.epochs")  # fmt: skip
    scheduled_sampling: float = field(0.0, "share of input words replaced by the model's own at the end of training;"
                                       " it grows linearly", least=0, most=1, only="train.epochs")  # fmt: skip
    cider_epochs: int = field(0, "epochs of self-critical training on CIDEr, after the other epochs", least=0)
    cider_learning_rate: float = field(5e-5, "peak learning rate of self-critical training, without warm-up", above=0,
                                        only="train.cider_epochs")  # fmt: skip
    cider_temperature: float = field(1.0, "temperature of self-critical sampling; less than 1 after label smoothing",
                                      above=0, only="train.cider_epochs")  # fmt: skip
    finetune: Finetune = group(Finetune, "a second stage, which starts with --init_from")
    hard_reward: float = field(0.1, "weight of the reward for the drawn positions", least=0,
                                only="train.epochs, model.attention=hard")  # fmt: skip
    hard_entropy: float = field(0.01, "weight of the entropy of the attention weights", least=0,
                                 only="train.epochs, model.attention=hard")  # fmt: skip
    clip_norm: float = field(5.0, "largest global norm of the gradient; 0: no clipping", least=0)
    dtype: str = field("float32", "arithmetic of the decoder; parameters and loss are always float32",
                        choices=("float32", "bfloat16"))  # fmt: skip
    matmul_dtype: str = field("", "type that the inputs of matrix products are rounded to; empty: dtype. bfloat16 is"
                               " fast on CPUs with AMX or AVX512-BF16", choices=("", "bfloat16"))  # fmt: skip
    num_buckets: int = field(8, "lengths that batches are padded to, chosen from the data", least=1,
                              identity=("run",))  # fmt: skip
    microbatch_images: int = field(0, "most images that a device computes at once, while their gradients accumulate;"
                                    " 0: about 16 on a CPU, else all", least=0)  # fmt: skip
    steps_per_dispatch: int = field(4, "consecutive steps of one length in one call to the device", least=1,
                                     identity=("run",))  # fmt: skip
    features: str = field("auto", "location of features: device memory, streamed from the store, or by their size",
                           choices=("auto", "device", "stream"))  # fmt: skip
    log_every: int = field(20, "steps between lines of metrics", least=1)
    checkpoint_every: int = field(0, "steps between checkpoints, beside the one of each epoch; 0: none", least=0)
    keep_latest: int = field(1, "newest checkpoints to keep, beside the best", least=1)


@dataclasses.dataclass
class Decode:
    """Decoding of captions. The sampling of self-critical training takes only `max_length` from here."""

    method: str = field("greedy", "decoding method", choices=("greedy", "sample", "beam"))
    max_length: int = field(30, "most tokens of a generated caption, <end> included", least=1, most=10_000)
    min_length: int = field(0, "fewest tokens of a generated caption, <end> not included", least=0, most=9_999)
    no_repeat_ngram: int = field(0, "length of token sequences that occur once at most in a caption; 0: no limit",
                                  least=0)  # fmt: skip
    bad_endings: str = field("", "words that no caption ends in: english (function words), or a list separated by"
                              " spaces; empty: captions end in any word")  # fmt: skip
    temperature: float = field(1.0, "divisor of the logits", above=0, only="decode.method=sample")
    top_k: int = field(0, "number of the most probable words to draw from; 0: all", least=0,
                        only="decode.method=sample")  # fmt: skip
    top_p: float = field(1.0, "draw from the fewest words that together have this probability", above=0, most=1,
                          only="decode.method=sample")  # fmt: skip
    beam_width: int = field(5, "hypotheses of an image at each step", least=1, most=1000, only="decode.method=beam")
    length_penalty: float = field(0.0, "captions rank by log-probability / length ** length_penalty", least=0,
                                   only="decode.method=beam")  # fmt: skip
    batch_size: int = field(64, "images decoded at once", least=1, most=1 << 16)


@dataclasses.dataclass
class Config:
    """A preset: everything that determines features, model, training and decoding."""

    dataset: str = field("coco_captions", "the data set", choices=("coco_captions", "flickr8k", "folder", "shapes"),
                          identity=("store",))  # fmt: skip
    seed: int = field(0, "seed of initialisation and of the order of batches", least=0, most=2**32 - 1,
                       identity=("run",))  # fmt: skip
    data: Data = group(Data, "the data set's splits and limits")
    encoder: Encoder = group(Encoder, "the network that computes features")
    model: Model = group(Model, "the caption decoder", identity=("model",))
    train: Train = group(Train, "batches, optimizer, regularisation and schedule")
    decode: Decode = group(Decode, "generation of captions")


def identity(config: Config, what: Identity) -> dict[str, Any]:
    """Returns {full name: value} of the fields that identify a store, a model or a run; a run's include both others."""
    fields = flatten(config).items()
    return {name: f.value for name, f in fields if what in f.identity or (what == "run" and f.identity)}


def difference(old: Config, new: Config, what: Identity) -> list[str]:
    """Returns "model.cell was gru, is lstm" for each field of `identity(..., what)` that differs."""
    a, b = identity(old, what), identity(new, what)
    return [f"{name} was {a[name]}, is {b[name]}" for name in a if a[name] != b[name]]


def check(config: Config) -> Config:
    """Returns the preset itself if all its values can be used.

    Raises:
      ConfigError: names the field, its value, and what was expected.
    """
    for name, found in flatten(config).items():
        if expected := found.rules.expected(found.value):
            raise ConfigError(f"--config.{name}={cut(str(found.value))}: expected {expected}")
    model, train = config.model, config.train
    if model.tied and model.embedding_dim != model.head_dim:
        raise ConfigError(
            f"--config.model.tied: embedding_dim={model.embedding_dim} and head_dim={model.head_dim} are expected equal"
        )
    if not train.epochs + train.cider_epochs:
        raise ConfigError("--config.train.epochs=0 and cider_epochs=0: expected more than 0 of either")
    if train.cider_epochs and train.captions_per_image < 2:
        raise ConfigError(
            f"--config.train.captions_per_image={train.captions_per_image}: expected 2 or more, because self-critical"
            " training compares captions of an image"
        )
    if train.finetune.block and train.cider_epochs:
        raise ConfigError(
            f"--config.train.finetune.block={train.finetune.block} with cider_epochs={train.cider_epochs}: expected"
            " one of the two in a run"
        )
    if config.decode.min_length >= config.decode.max_length:
        raise ConfigError(
            f"--config.decode.min_length={config.decode.min_length} with max_length={config.decode.max_length}:"
            " expected less, because <end> follows the last word"
        )
    return config
