"""Encodes images by Keras's InceptionV3 in TensorFlow: 299 pixels, random weights, no JPEG decoding."""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import tensorflow as tf
from meter import Meter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mode", choices=["eager", "fn"], default="eager", help="eager is the tutorial's; fn: tf.function"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="timed batches")
    a = parser.parse_args()
    network = tf.keras.applications.InceptionV3(include_top=False, weights=None)
    model = tf.keras.Model(network.input, network.layers[-1].output)
    encode = tf.function(lambda pixels: model(pixels, training=False)) if a.mode == "fn" else model
    pixels = [tf.random.uniform((a.batch, 299, 299, 3), -1, 1) for _ in range(3)]
    meter = Meter("tensorflow", f"inception_v3 batch{a.batch} {a.mode}", "images", version=tf.__version__)
    begin = time.perf_counter()
    feats = encode(pixels[0])
    first_s = time.perf_counter() - begin
    if feats.shape != (a.batch, 8, 8, 2048):
        raise RuntimeError(f"features: found {tuple(feats.shape)}, expected {(a.batch, 8, 8, 2048)}")
    encode(pixels[1])
    meter.start()
    for number in range(a.steps):
        tf.reshape(encode(pixels[number % 3]), (a.batch, -1, 2048)).numpy()
        meter.step(a.batch)
    meter.finish(first_step_s=round(first_s, 1))


if __name__ == "__main__":
    main()
