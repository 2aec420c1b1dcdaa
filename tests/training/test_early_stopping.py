"""Early stopping, and the learning rate on a plateau."""

from typing import Any

import jax
import numpy as np
import pytest

from flaxcap.config import Train
from flaxcap.runtime import sharding
from flaxcap.training.early_stopping import EarlyStopping
from flaxcap.training.state import TrainState


def state_with(rate: float) -> TrainState:
    state: Any = TrainState
    everywhere = sharding.replicated(sharding.make_mesh())
    return state(*[None] * 5, rate=jax.device_put(np.float32(rate), everywhere), baseline=None)


def test_the_rate_falls_on_a_plateau():
    """After every two of them. An equal score is not better; a better score starts the count again."""
    early_stopping = EarlyStopping(Train(schedule="plateau", plateau_epochs=2, plateau_factor=0.5), {})
    state, rates = state_with(1.0), []
    for score in (0.1, 0.3, 0.3, 0.2, 0.1, 0.25, 0.4, 0.3, 0.5, 0.1, 0.1):
        before = state.rate
        state = early_stopping.record(score, state)
        assert state.rate.sharding == before.sharding
        rates.append(float(state.rate))
    assert rates == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.125]
    assert early_stopping.progress == {"best": 0.5, "since": 2}


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_other_schedules_ignore_the_score(schedule):
    early_stopping = EarlyStopping(Train(schedule=schedule, plateau_epochs=1), {})
    state = state_with(1.0)
    for score in (0.3, 0.2, 0.1):
        assert early_stopping.record(score, state) is state
    assert not early_stopping.stop


def test_a_run_stops_after_enough_epochs_without_a_better_score():
    config = Train(stop_after=2)
    early_stopping, stops = EarlyStopping(config, {}), []
    for score in (0.1, 0.1, 0.2, 0.1, 0.15):
        early_stopping.record(score, state_with(1.0))
        stops.append(early_stopping.stop)
    assert stops == [False, False, False, False, True]
    resumed = EarlyStopping(config, early_stopping.progress)
    assert (resumed.best, resumed.since, resumed.stop) == (0.2, 2, True)
    assert not EarlyStopping(Train(stop_after=0), early_stopping.progress).stop
