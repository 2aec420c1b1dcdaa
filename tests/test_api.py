"""`import flaxcap` offers the public names without importing JAX."""

import subprocess
import sys

import pytest

import flaxcap
from flaxcap.commands import evaluate, prepare, train
from flaxcap.config import Config
from flaxcap.inference import captioner, loading


def test_the_import_is_fast_and_imports_no_jax():
    code = (
        "import flaxcap, sys; assert 'load' in dir(flaxcap); print(sorted({'jax', 'numpy', 'flax'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_names_are_those_of_their_owners():
    assert flaxcap.load is loading.load
    assert flaxcap.Captioner is captioner.Captioner
    assert flaxcap.Config is Config
    assert (flaxcap.prepare, flaxcap.train, flaxcap.evaluate) == (prepare.prepare, train.train, evaluate.evaluate)
    assert set(flaxcap.__all__) <= set(dir(flaxcap))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'flaxcap' has no attribute 'trian'"):
        _ = flaxcap.trian  # pyright: ignore[reportAttributeAccessIssue]
