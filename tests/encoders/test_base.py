"""The registry of encoders, and what they share."""

import numpy as np
import pytest
from command import ROOT

from flaxcap import config as config_lib
from flaxcap.config import ConfigError, Encoder
from flaxcap.encoders import base
from flaxcap.encoders.inception_v3.encoder import InceptionV3

ENCODERS = ROOT / "flaxcap" / "encoders"


def test_the_default_encoder_is_registered():
    assert base.make(Encoder()).name == "inception_v3-mixed10"


def test_an_encoder_is_made_from_its_preset(monkeypatch):
    monkeypatch.setattr(base, "_ENCODERS", dict(base._ENCODERS))
    presets = []
    base.register("regions", lambda config: presets.append(config) or InceptionV3(config))
    config = Encoder("regions", block="mixed3")
    assert base.make(config).name == "inception_v3-mixed3"
    assert presets == [config]


def test_an_unknown_encoder_is_refused_with_a_hint():
    message = r"encoder\.name=inception_v2: expected one of imported, inception_v3; did you mean 'inception_v3'\?"
    with pytest.raises(ConfigError, match=message):
        base.make(Encoder("inception_v2"))


def test_the_digest_depends_on_names_and_values():
    params = {"a": {"x": np.arange(3.0), "y": np.ones(2)}, "b": {"x": np.zeros(1)}}
    same = {"a": {"y": np.ones(2, np.float32), "x": np.arange(3.0)}, "b": {"x": np.zeros(1)}}
    assert base.digest(params) == base.digest(same)
    others = [
        {"a": {"x": np.arange(3.0), "y": np.ones(2)}, "b": {"x": np.full(1, 1e-6)}},
        {"a": {"x": np.arange(3.0), "z": np.ones(2)}, "b": {"x": np.zeros(1)}},
        {"a": {"x": np.arange(3.0), "y": np.ones(2)}, "c": {"x": np.zeros(1)}},
        {"a": {"x": np.arange(3.0), "y": np.ones(2)}},
    ]
    assert len({base.digest(tree) for tree in (params, *others)}) == 5


def test_no_module_outside_of_the_package_names_an_encoder():
    """The default of `config.encoder.name` is the only exception."""
    files = [file for file in (ROOT / "flaxcap").rglob("*.py") if ENCODERS not in file.parents]
    lines = [line for file in files for line in file.read_text().splitlines() if "inception" in line.lower()]
    assert len(files) > 50
    assert len(lines) == 1
    assert f'name: str = field("{config_lib.Encoder().name}"' in lines[0]
