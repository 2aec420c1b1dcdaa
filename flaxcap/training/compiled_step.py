"""The compiled programs of a train step, and the memory that they need."""

from typing import Any

import jax

from flaxcap.input_pipeline.device_feed import Feed
from flaxcap.runtime import device_memory
from flaxcap.training.state import TrainState


class CompiledStep:
    """A train step with one compiled program for each caption length."""

    def __init__(self, train_step: Any, state: TrainState, feed: Feed):
        """Compiles nothing yet.

        Args:
          train_step: a jitted `train_step(state, inputs)`.
          state: gives shapes and shardings.
          feed: gives the shapes of the inputs.
        """
        self._train_step, self._feed = train_step, feed
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        self._of_length: dict[int, jax.stages.Compiled] = {}

    def __contains__(self, length: int) -> bool:
        """Returns whether the program for `length` is compiled."""
        return length in self._of_length

    def lookup(self, length: int) -> jax.stages.Compiled:
        """Returns the program for captions padded to `length` tokens; compiles it on the first call."""
        if length not in self._of_length:
            self._of_length[length] = self._compile(None, length)
        return self._of_length[length]

    def check_memory(self, images: int, length: int) -> int:
        """Returns the bytes that a step needs on each device.

        Args:
          images: images of a batch.
          length: tokens of a caption.

        Raises:
          ConfigError: a device has less memory.
        """

        def compile_for(count: int) -> jax.stages.Compiled:
            return self.lookup(length) if count == images else self._compile(count, length)

        return device_memory.check(compile_for, images, jax.local_devices(), jax.device_count())

    def _compile(self, images: int | None, length: int) -> jax.stages.Compiled:
        return self._train_step.lower(self._state, self._feed.spec(length, images)).compile()
