"""Captions one image at a time as the TensorFlow tutorial does: 20 words, each sampled, in a Python loop."""

import argparse
import time

import numpy as np
from meter import Meter
from tf_models import TutorialDecoder, TutorialEncoder, tf
from workload import POSITIONS, START, UNITS, random_features

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fn", action="store_true", help="the decoder as a tf.function; the tutorial runs it eagerly")
    parser.add_argument("--steps", type=int, default=25, help="timed images")
    a = parser.parse_args()
    encoder, decoder = TutorialEncoder(), TutorialDecoder()
    decode = tf.function(decoder, reduce_retracing=True) if a.fn else decoder
    bank = random_features(a.steps + 2)

    def caption(image) -> list[int]:
        weights, found = np.zeros((STEPS, POSITIONS)), []
        values, hidden, token = encoder(image), tf.zeros((1, UNITS)), tf.expand_dims([START], 0)
        for t in range(STEPS):
            logits, hidden, now = decode(token, values, hidden)
            weights[t] = tf.reshape(now, (-1,)).numpy()
            found.append(int(tf.random.categorical(logits, 1)[0][0].numpy()))
            token = tf.expand_dims([found[-1]], 0)
        return found

    setting = f"tutorial one image, {STEPS} steps, {'tf.function' if a.fn else 'eager'}"
    meter = Meter("tensorflow", setting, version=tf.__version__)
    begin = time.perf_counter()
    caption(tf.constant(bank[:1]))
    first_s = time.perf_counter() - begin
    caption(tf.constant(bank[1:2]))
    meter.start()
    for number in range(2, a.steps + 2):
        caption(tf.constant(bank[number : number + 1]))
        meter.step(1, STEPS)
    meter.finish(first_image_s=round(first_s, 1))


if __name__ == "__main__":
    main()
