"""The captioner of TensorFlow's tutorial "image captioning with visual attention", in its original InceptionV3 form.

Written from the tutorial's description. Its GRU is called without its state, and its loss averages over padding.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import tensorflow as tf
from workload import EMBEDDING, UNITS, VOCABULARY

layers = tf.keras.layers


class TutorialEncoder(tf.keras.Model):
    """Projects features `[B, 64, 2048]` to `[B, 64, 256]`."""

    def __init__(self):
        super().__init__()
        self.project = layers.Dense(EMBEDDING)

    def call(self, image):
        return tf.nn.relu(self.project(image))


class TutorialDecoder(tf.keras.Model):
    """One word: additive attention, a GRU and two output layers."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(VOCABULARY, EMBEDDING)
        self.gru = layers.GRU(UNITS, return_sequences=True, return_state=True, recurrent_initializer="glorot_uniform")
        self.head, self.vocabulary = layers.Dense(UNITS), layers.Dense(VOCABULARY)
        self.keys, self.query, self.score = layers.Dense(UNITS), layers.Dense(UNITS), layers.Dense(1)

    def call(self, token, image, hidden):
        """Returns logits `[B, V]`, the GRU's state and the attention weights."""
        score = self.score(tf.nn.tanh(self.keys(image) + self.query(tf.expand_dims(hidden, 1))))
        weights = tf.nn.softmax(score, axis=1)
        context = tf.reduce_sum(weights * image, axis=1)
        out, state = self.gru(tf.concat([tf.expand_dims(context, 1), self.embedding(token)], axis=-1))
        return self.vocabulary(tf.reshape(self.head(out), (-1, UNITS))), state, weights
