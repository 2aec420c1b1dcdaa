"""Trains the TensorFlow tutorial's captioner with its own step: one tf.function around a Python loop over the words."""

import argparse
import os
import time

import numpy as np
from meter import Meter
from tf_models import TutorialDecoder, TutorialEncoder, tf
from workload import BATCH, KEPT, START, UNITS, batches, random_features


def make_step(jit: bool):
    """Returns the tutorial's train step: (features, tokens) to the sum over words of the mean loss."""
    encoder, decoder, optimizer = TutorialEncoder(), TutorialDecoder(), tf.keras.optimizers.Adam()
    cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")

    @tf.function(jit_compile=True if jit else None)
    def step(image, tokens):
        total, hidden = 0.0, tf.zeros((tokens.shape[0], UNITS))
        token = tf.expand_dims([START] * tokens.shape[0], 1)
        with tf.GradientTape() as tape:
            values = encoder(image)
            for t in range(1, tokens.shape[1]):
                logits, hidden, _ = decoder(token, values, hidden)
                losses = cross_entropy(tokens[:, t], logits)
                total += tf.reduce_mean(losses * tf.cast(tf.not_equal(tokens[:, t], 0), losses.dtype))
                token = tf.expand_dims(tokens[:, t], 1)
        variables = encoder.trainable_variables + decoder.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(total, variables), variables, strict=True))
        return total

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pad", default="50", choices=["50", "20"], help="tokens of a padded caption")
    parser.add_argument("--steps", type=int, default=22, help="timed steps")
    parser.add_argument("--warm", type=int, default=2, help="steps before them; the first traces the function")
    parser.add_argument("--jit", action="store_true", help="tf.function(jit_compile=True)")
    a = parser.parse_args()
    bank, plan = random_features(), batches(a.pad, a.warm + a.steps)
    kept = [(tf.constant(bank[images]), tf.constant(tokens)) for tokens, _, images in plan[:KEPT]]
    del bank
    step = make_step(a.jit)
    setting = f"tutorial batch{BATCH} pad {a.pad}{' jit_compile' * a.jit}"
    meter = Meter("tensorflow", setting, version=tf.__version__, threads=os.cpu_count())
    begin = time.perf_counter()
    loss = float(step(*kept[0]))
    first_s = time.perf_counter() - begin
    for number in range(1, a.warm):
        float(step(*kept[number % len(kept)]))
    meter.start()
    for number in range(a.warm, a.warm + a.steps):
        image, tokens = kept[number % len(kept)]
        loss = float(step(image, tokens))
        meter.step(BATCH, int(np.count_nonzero(tokens.numpy()[:, 1:])))
    meter.finish(first_step_s=round(first_s, 1), loss=round(loss, 3))


if __name__ == "__main__":
    main()
