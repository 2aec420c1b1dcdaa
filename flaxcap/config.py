"""The preset: typed dataclasses, and the one place where a default stands.

The command line overrides its fields (`--config.train.epochs=3`); presets.py reads and writes it.
"""

import dataclasses
import difflib
import math
import typing

from flaxcap.errors import UserError, cut


class ConfigError(UserError):
    """A preset, or a field of one, that cannot be used."""


def _field(default, help: str, choices: tuple = ()):
    if choices:
        help = f"{help} <{'|'.join(choices)}>"
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def _group(cls, help: str):
    return dataclasses.field(default_factory=cls, metadata={"help": help})


@dataclasses.dataclass
class Shapes:
    num_train: int = _field(10_000, "rendered training images")
    num_val: int = _field(300, "rendered validation images, each with a held-out kind of object")
    num_test: int = _field(300, "rendered test images, each with a held-out kind of object")
    seed: int = _field(0, "seed of the rendered scenes")


@dataclasses.dataclass
class Data:
    train_split: str = _field("train", "TFDS split trained on, such as train+restval")
    val_split: str = _field("val", "TFDS split that chooses the best checkpoint")
    test_split: str = _field("test", "TFDS split kept for the end; empty: none")
    max_images: int = _field(0, "take at most so many images of each split; 0: all")
    max_captions: int = _field(0, "take at most so many captions of each split; 0: all")
    vocab_size: int = _field(5000, "keep so many of the training captions' most frequent words")
    max_length: int = _field(50, "longest caption in tokens, <start> and <end> included; longer ones are cut")
    shapes: Shapes = _group(Shapes, "the rendered data set `shapes`")


@dataclasses.dataclass
class Encoder:
    weights: str = _field("imagenet", "imagenet (downloaded once), random, or the path of a Keras no-top .h5")
    block: str = _field("mixed10", "InceptionV3 block that gives the features",
                        tuple(f"mixed{n}" for n in range(11)))  # fmt: skip
    image_size: int = _field(299, "pixels a side that pictures are resized to")
    dtype: str = _field("float32", "arithmetic of the encoder", ("float32", "bfloat16"))
    store_dtype: str = _field("bfloat16", "type of the stored features", ("float32", "bfloat16"))
    batch_size: int = _field(0, "images a forward pass; 0: for each device 2 on a CPU, where that is fastest, else 64")
    shard_images: int = _field(1024, "images a file of features; an interrupted prepare goes on at such a file")
    seed: int = _field(0, "seed of random weights")


@dataclasses.dataclass
class Model:
    image_dim: int = _field(256, "width that the features are projected to")
    positions: bool = _field(False, "add a learned embedding of its place in the grid to each projected feature")
    embedding_dim: int = _field(256, "width of a word's embedding")
    attention_dim: int = _field(512, "width of the additive attention")
    hidden_dim: int = _field(512, "width of the recurrent state")
    head_dim: int = _field(512, "width of the first of the two output layers")
    cell: str = _field("gru", "recurrent cell", ("gru", "lstm"))
    attention_gate: bool = _field(False, "scale the context by a learned gate (Show, Attend and Tell, 4.2.1)")
    initial_state: str = _field("zeros", "first recurrent state, made of nothing or of the mean of the image's grid",
                                ("zeros", "mean"))  # fmt: skip
    attention: str = _field("soft", "look at the weighted sum of the grid, or, in training, at one place drawn by the"
                            " weights and learned by REINFORCE (Xu et al. 2015, 4.1)", ("soft", "hard"))  # fmt: skip
    output: str = _field("state", "words follow from the state alone, or also from what was seen and the last word"
                         " (Show, Attend and Tell, equation 7)", ("state", "deep"))  # fmt: skip
    tied: bool = _field(False, "the last layer has the embedding's weights; embedding_dim and head_dim are equal")
    embeddings: str = _field("", "a text file of word vectors (GloVe's format) that the embedding starts with")


@dataclasses.dataclass
class Dropout:
    """Shares that training hides, anew at each step."""

    image: float = _field(0.0, "of the projected grid")
    embedding: float = _field(0.0, "of a word's embedding")
    attention: float = _field(0.0, "of the attention weights")
    recurrent: float = _field(0.0, "of the recurrent state, the same for all of a caption's words (arXiv:1512.05287)")
    output: float = _field(0.0, "of what the output layers take")


@dataclasses.dataclass
class Finetune:
    block: str = _field("", "train the encoder too, from this block on; empty: features are read as prepared",
                        ("", *(f"mixed{n}" for n in range(11))))  # fmt: skip
    learning_rate: float = _field(1e-5, "of the encoder")
    flip: bool = _field(True, "mirror half of the pictures")
    crop: float = _field(0.8, "crop pictures at random, at most to this share of their sides")


@dataclasses.dataclass
class Train:
    batch_images: int = _field(64, "images a step, over all devices")
    captions_per_image: int = _field(5, "captions of an image that share a step")
    epochs: int = _field(20, "passes over the training captions")
    learning_rate: float = _field(1e-3, "peak learning rate of Adam")
    warmup_steps: int = _field(100, "steps of linear warm-up")
    schedule: str = _field("cosine", "learning rate after the warm-up: down to 2% (of each stage's), kept, or"
                           " multiplied by plateau_factor whenever plateau_epochs brought no better validation",
                           ("cosine", "constant", "plateau"))  # fmt: skip
    plateau_epochs: int = _field(2, "schedule=plateau: epochs without a better validation score")
    plateau_factor: float = _field(0.5, "schedule=plateau: what the learning rate is multiplied by")
    stop_after: int = _field(0, "end the run after so many epochs without a better validation score; 0: never")
    weight_decay: float = _field(0.0, "of matrices, decoupled from the gradient and times the learning rate (AdamW)")
    ema: float = _field(0.0, "validate and keep a moving average of the parameters with this decay; 0: the newest")
    dropout: Dropout = _group(Dropout, "what training hides")
    label_smoothing: float = _field(0.0, "share of a target's probability that is spread over all words")
    doubly_stochastic: float = _field(0.0, "weight of attention's regulariser: a caption sees each place once in all")
    scheduled_sampling: float = _field(0.0, "share of given words replaced by the model's own at the end of training,"
                                       " where it grows to linearly")  # fmt: skip
    cider_epochs: int = _field(0, "epochs of self-critical training on CIDEr, after the others")
    cider_learning_rate: float = _field(5e-5, "peak learning rate of self-critical training, which has no warm-up")
    cider_temperature: float = _field(1.0, "temperature at which it draws captions; less than 1 after label smoothing")
    finetune: Finetune = _group(Finetune, "a second stage, which starts with --init_from")
    hard_reward: float = _field(0.1, "attention=hard: weight of the reward for the places drawn")
    hard_entropy: float = _field(0.01, "attention=hard: weight of the entropy of the attention weights")
    clip_norm: float = _field(5.0, "largest global norm of the gradient; 0: no clipping")
    dtype: str = _field("float32", "arithmetic of the decoder; parameters and loss are always float32",
                        ("float32", "bfloat16"))  # fmt: skip
    matmul_dtype: str = _field("", "type that numbers are rounded to before matrix products multiply them, all else"
                               " stays of dtype; '': dtype. bfloat16 is quick where a CPU has AMX or AVX512-BF16",
                               ("", "bfloat16"))  # fmt: skip
    num_buckets: int = _field(8, "lengths that batches are padded to, chosen from the data")
    microbatch_images: int = _field(
        0, "most images a device computes at once, their gradients add up to the step's; 0: about 16 on a CPU, else all"
    )
    steps_per_dispatch: int = _field(4, "steps of one length that follow each other, sent to the device together")
    features: str = _field("auto", "where features live: in device memory, streamed from the store, or by size",
                           ("auto", "device", "stream"))  # fmt: skip
    log_every: int = _field(20, "steps between lines of metrics")
    checkpoint_every: int = _field(0, "steps between checkpoints; one is kept each epoch in any case; 0: no more")
    keep_latest: int = _field(1, "newest checkpoints kept, beside the best")


@dataclasses.dataclass
class Decode:
    method: str = _field("greedy", "how captions are decoded", ("greedy", "sample", "beam"))
    max_length: int = _field(30, "most tokens of a generated caption, <end> included")
    temperature: float = _field(1.0, "sampling: divides the logits; smaller is safer")
    top_k: int = _field(0, "sampling: choose among so many best words; 0: all")
    top_p: float = _field(1.0, "sampling: choose among the fewest best words that together have this probability")
    beam_width: int = _field(5, "beam search: hypotheses of an image that go on at each step")
    length_penalty: float = _field(0.0, "beam search: captions compete by log-probability / length to this power")
    no_repeat_ngram: int = _field(0, "beam search: no run of so many words occurs twice in a caption; 0: it may")
    batch_size: int = _field(64, "images decoded at once")


@dataclasses.dataclass
class Config:
    dataset: str = _field("coco_captions", "the data set", ("coco_captions", "flickr8k", "folder", "shapes"))
    seed: int = _field(0, "seed of initialisation and of the order of the batches")
    data: Data = _group(Data, "what is read")
    encoder: Encoder = _group(Encoder, "how pictures become features")
    model: Model = _group(Model, "the caption decoder")
    train: Train = _group(Train, "how it is trained")
    decode: Decode = _group(Decode, "how it captions")


def leaves(config: object, prefix: str = "") -> dict[str, tuple[object, str]]:
    """{"train.epochs": (value, help), ...} for every field."""
    found = {}
    for f in dataclasses.fields(typing.cast(typing.Any, config)):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = (value, f.metadata["help"])
    return found


def nearest(name: str, names: list[str]) -> str:
    """ "; did you mean ...?" or, where nothing is near, nothing."""
    last, end = {n.rsplit(".", 1)[-1]: n for n in names}, name.rsplit(".", 1)[-1]
    match = [last[end]] if end in last else difflib.get_close_matches(name, names, 1, 0.5)
    if not match:
        match = [last[m] for m in difflib.get_close_matches(end, list(last), 1, 0.6)]
    return f"; did you mean {match[0]!r}?" if match else ""


_POSITIVE = {
    "data": ("vocab_size",),
    "data.shapes": ("num_train", "num_val"),
    "encoder": ("image_size", "shard_images"),
    "model": ("image_dim", "embedding_dim", "attention_dim", "hidden_dim", "head_dim"),
    "train": (
        "batch_images", "captions_per_image", "learning_rate", "num_buckets", "steps_per_dispatch",
        "log_every", "keep_latest", "plateau_epochs", "plateau_factor", "cider_learning_rate", "cider_temperature",
    ),
    "train.finetune": ("learning_rate", "crop"),
    "decode": ("max_length", "temperature", "top_p", "beam_width", "batch_size"),
}  # fmt: skip
_NOT_NEGATIVE = {
    "data": ("max_images", "max_captions"),
    "data.shapes": ("num_test",),
    "encoder": ("batch_size",),
    "train": (
        "epochs", "cider_epochs", "warmup_steps", "clip_norm", "microbatch_images", "checkpoint_every", "stop_after",
        "weight_decay", "doubly_stochastic", "hard_reward", "hard_entropy",
    ),
    "decode": ("top_k", "length_penalty", "no_repeat_ngram"),
}  # fmt: skip
_DROPOUT = tuple(f"train.dropout.{name}" for name in ("image", "embedding", "attention", "recurrent", "output"))
_SEEDS = ("seed", "data.shapes.seed", "encoder.seed")
# What memory is in proportion to, far beyond use: a preset may come with a stranger's model. Others: less than 2**31.
_AT_MOST: dict[str, int] = {
    "data.max_length": 10_000, "encoder.image_size": 4096, "encoder.batch_size": 1 << 16,
    **{f"model.{name}_dim": 1 << 16 for name in ("image", "embedding", "attention", "hidden", "head")},
    "decode.max_length": 10_000, "decode.beam_width": 1000, "decode.batch_size": 1 << 16,
}  # fmt: skip


def check(config: Config) -> Config:
    """The same preset, or a ConfigError that names the field, what was found and what was expected."""
    values: dict[str, typing.Any] = {name: value for name, (value, _) in leaves(config).items()}
    for table, least, expected in ((_POSITIVE, 1e-30, "more than 0"), (_NOT_NEGATIVE, 0, "0 or more")):
        for group, names in table.items():
            for name in names:
                value = values[f"{group}.{name}"]
                if not value >= least:
                    raise ConfigError(f"--config.{group}.{name}={cut(str(value))}: expected {expected}")
    if config.data.max_length < 3:
        raise ConfigError(f"--config.data.max_length={config.data.max_length}: expected 3 or more")
    for name in ("train.ema", "train.label_smoothing"):
        if not 0 <= values[name] < 1:
            raise ConfigError(f"--config.{name}={values[name]}: expected 0 or more, and less than 1")
    for name in _DROPOUT:
        if not 0 <= values[name] <= 0.99:
            raise ConfigError(f"--config.{name}={values[name]}: expected 0 to 0.99")
    for name in ("train.scheduled_sampling", "train.plateau_factor", "train.finetune.crop", "decode.top_p"):
        if not 0 <= values[name] <= 1:
            raise ConfigError(f"--config.{name}={values[name]}: expected 0 to 1")
    model = config.model
    if model.tied and model.embedding_dim != model.head_dim:
        raise ConfigError(
            f"--config.model.tied: embedding_dim={model.embedding_dim} and head_dim={model.head_dim} are expected equal"
        )
    if not config.train.epochs + config.train.cider_epochs:
        raise ConfigError("--config.train.epochs=0 and cider_epochs=0: expected more than 0 of either")
    if config.train.cider_epochs and config.train.captions_per_image < 2:
        raise ConfigError(
            f"--config.train.captions_per_image={config.train.captions_per_image}: expected 2 or more, as"
            " self-critical training compares captions of an image"
        )
    if config.train.finetune.block and config.train.cider_epochs:
        raise ConfigError("--config.train.finetune.block with cider_epochs: expected one of the two in a run")
    for name in _SEEDS:
        if not 0 <= values[name] < 2**32:
            raise ConfigError(f"--config.{name}={cut(str(values[name]))}: expected 0 to {2**32 - 1}")
    for name in ("data.train_split", "data.val_split"):
        if not values[name]:
            raise ConfigError(f"--config.{name} is empty: expected the name of a split")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--config.{name}={value}: expected a finite number")
        most = _AT_MOST.get(name) or 2**31 - 1
        if type(value) is int and value > most and name not in _SEEDS:
            raise ConfigError(f"--config.{name}={cut(str(value))}: expected at most {most}")
    _check_choices(config, "")
    return config


def _check_choices(node: object, prefix: str) -> None:
    for f in dataclasses.fields(typing.cast(typing.Any, node)):
        value, choices = getattr(node, f.name), f.metadata.get("choices", ())
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{prefix}{f.name}.")
        elif choices and value not in choices:
            raise ConfigError(f"--config.{prefix}{f.name}={cut(str(value))}: expected one of {', '.join(choices)}"
                              + nearest(cut(str(value)), list(choices)))  # fmt: skip
