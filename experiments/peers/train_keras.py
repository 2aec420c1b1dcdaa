"""Trains flaxcap's default model in Keras 3: keras.layers.RNN around a GRU cell with attention.

KERAS_BACKEND names the library below it: jax (venv-keras) or tensorflow (venv-tf). Features and attention keys are part
of the RNN's state, because Keras 3's RNN takes no constants.
"""

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
from keras import layers, ops
from meter import Meter
from workload import BATCH, EMBEDDING, FEATURES, KEPT, POSITIONS, UNITS, VOCABULARY, batches, random_features


class AttentionGRUCell(layers.Layer):
    """One word: additive attention and a GRU."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gru = layers.GRUCell(UNITS, recurrent_initializer="glorot_uniform")
        self.query, self.score = layers.Dense(UNITS), layers.Dense(1)
        self.state_size = [UNITS, (POSITIONS, EMBEDDING), (POSITIONS, UNITS)]
        self.output_size = UNITS

    def build(self, shape):
        self.gru.build((shape[0], 2 * EMBEDDING))
        self.query.build((shape[0], UNITS))
        self.score.build((shape[0], POSITIONS, UNITS))
        self.built = True

    def call(self, word, states, training=False):
        hidden, values, keys = states
        weights = ops.softmax(self.score(ops.tanh(keys + ops.expand_dims(self.query(hidden), 1))), axis=1)
        context = ops.sum(weights * values, axis=1)
        out, (hidden,) = self.gru(ops.concatenate([context, word], -1), [hidden])
        return out, [hidden, values, keys]


def make_model(length: int, unroll: bool) -> keras.Model:
    """Returns the compiled model: features, tokens and initial state to logits."""
    image = keras.Input((POSITIONS, FEATURES))
    tokens = keras.Input((length,), dtype="int32")
    initial = keras.Input((UNITS,))
    values = layers.Dense(EMBEDDING, activation="relu")(image)
    words = layers.Embedding(VOCABULARY, EMBEDDING)(tokens)
    recurrent = layers.RNN(AttentionGRUCell(), return_sequences=True, unroll=unroll)
    states = recurrent(words, initial_state=[initial, values, layers.Dense(UNITS)(values)])
    logits = layers.Dense(VOCABULARY)(layers.Dense(UNITS)(states))
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)

    def loss(targets, logits):
        return ops.sum(ops.where(ops.not_equal(targets, 0), cross_entropy(targets, logits), 0.0)) / BATCH

    model = keras.Model([image, tokens, initial], logits)
    model.compile(optimizer=keras.optimizers.Adam(), loss=loss)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pad", default="20", choices=["50", "20"], help="tokens of a padded caption")
    parser.add_argument("--steps", type=int, default=25, help="timed steps")
    parser.add_argument("--warm", type=int, default=3, help="steps before them")
    parser.add_argument("--unroll", action="store_true", help="the RNN's loop")
    a = parser.parse_args()
    model = make_model(int(a.pad) - 1, a.unroll)
    total = a.warm + a.steps
    bank, plan = random_features(), batches(a.pad, total)
    kept = [bank[images] for _, _, images in plan[:KEPT]]
    del bank
    initial = np.zeros((BATCH, UNITS), np.float32)

    def step(number: int) -> float:
        tokens = plan[number][0]
        return float(model.train_on_batch([kept[number % len(kept)], tokens[:, :-1], initial], tokens[:, 1:]))

    setting = f"{keras.backend.backend()} batch{BATCH} pad {a.pad}{' unroll' * a.unroll}"
    meter = Meter("keras", setting, version=keras.__version__, threads=os.cpu_count())
    begin = time.perf_counter()
    step(0)
    first_s = time.perf_counter() - begin
    for number in range(1, a.warm):
        step(number)
    meter.start()
    loss = 0.0
    for number in range(a.warm, total):
        loss = step(number)
        meter.step(BATCH, int((plan[number][1] - 1).sum()))
    meter.finish(first_step_s=round(first_s, 1), loss=round(loss, 3))


if __name__ == "__main__":
    main()
