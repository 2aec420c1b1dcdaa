"""Early stopping, and the learning rate that follows validation."""

import math

import jax
import numpy as np

from flaxcap.config import Train
from flaxcap.training.state import TrainState


class EarlyStopping:
    """Tracks the best validation score. It lowers the learning rate on a plateau and ends a run without progress."""

    def __init__(self, config: Train, progress: dict):
        """Starts a run, or resumes one from the `progress` of a checkpoint; {}: a new run."""
        self._config = config
        self.best: float = progress.get("best", -math.inf)
        self.since: int = progress.get("since", 0)  # epochs since the best score

    @property
    def progress(self) -> dict:
        """The best score and the epochs since, as a checkpoint keeps them."""
        return {"best": self.best, "since": self.since}

    @property
    def stop(self) -> bool:
        """True once `stop_after` epochs have passed without a better score."""
        return 0 < self._config.stop_after <= self.since

    def record(self, score: float, state: TrainState) -> TrainState:
        """Records the score of an epoch. Returns the state, with a lower `rate` on a plateau."""
        c = self._config
        better = score > self.best
        self.best, self.since = max(score, self.best), 0 if better else self.since + 1
        if c.schedule != "plateau" or not self.since or self.since % c.plateau_epochs:
            return state
        rate = np.asarray(jax.device_get(state.rate) * np.float32(c.plateau_factor))
        return state._replace(rate=jax.device_put(rate, state.rate.sharding))
