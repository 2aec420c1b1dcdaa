"""The baselines in experiments/peers: their data and figures, and the commands that documents name."""

import json
import pathlib
import re
import types

import numpy as np
import pytest
from command import ROOT
from peers import meter, workload

from flaxcap.bench import synthetic
from flaxcap.config import Config, Data, Model
from flaxcap.text.vocabulary import END, START

PEERS = ROOT / "experiments" / "peers"
DOCUMENTS = [ROOT / "experiments" / "throughput.md", PEERS / "README.md"]


def test_their_captions_have_the_lengths_of_ours():
    tokens, lengths = workload.captions()
    ours = np.diff(synthetic.captions(workload.IMAGES, Data(vocab_size=5000, max_length=50)).starts)
    assert (workload.START, workload.END, workload.VOCABULARY) == (START, END, 5001)
    assert (lengths.min(), lengths.mean()) == (ours.min(), pytest.approx(ours.mean(), abs=0.1))
    assert lengths.std() == pytest.approx(ours.std(), abs=0.1)
    assert (tokens[:, 0] == START).all()
    assert (tokens[np.arange(len(tokens)), lengths - 1] == END).all()
    assert ((tokens > 0).sum(1) == lengths).all()


def test_their_models_have_the_default_sizes():
    model = Model()
    assert {model.image_dim, model.embedding_dim} == {workload.EMBEDDING}
    assert {model.attention_dim, model.hidden_dim, model.head_dim} == {workload.UNITS}
    assert Config().train.batch_images == workload.BATCH


@pytest.mark.parametrize(("pad", "width"), [("batch", None), ("20", 20), ("50", 50)])
def test_batches_are_padded_as_named(pad, width):
    for tokens, lengths, images in workload.batches(pad, 3, size=8, longest_first=True):
        assert tokens.shape == (8, width or lengths.max())
        assert (np.diff(lengths) <= 0).all()
        assert ((tokens > 0).sum(1) == lengths).all()
        assert images.max() < workload.IMAGES


def test_the_meter_prints_what_baselines_are_read_by(monkeypatch, capsys):
    clock = iter([0, 1, 1, 3, 3, 13, 13])
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock), strftime=lambda _: "now")
    monkeypatch.setattr(meter, "time", fake)
    timed = meter.Meter("a library", "a setting", threads=2)
    timed.start()
    for _ in range(3):
        timed.step(8, tokens=40)
    timed.finish(loss=1.5)
    found = json.loads(capsys.readouterr().out)
    assert (found["captions_s"], found["tokens_s"], found["step_ms"]) == (4, 20, 2000)
    assert found["captions_s_mean"] == pytest.approx(24 / 13, abs=0.01)
    assert (found["steps"], found["threads"], found["loss"]) == (3, 2, 1.5)


def commands(document: pathlib.Path) -> list[tuple[str, list[str]]]:
    """Returns the scripts of experiments/peers that a document runs, and the options of each."""
    found = re.findall(r'(\w+\.py)((?: --?[\w-]+(?:[ =][\w.]+)?)*)"', document.read_text())
    return [(script, re.findall(r"--([\w-]+)", options)) for script, options in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_in_documents_name_scripts_and_options_that_exist(document):
    found = commands(document)
    assert found
    for script, options in found:
        known = re.findall(r'add_argument\(\s*"--(\w+)"', (PEERS / script).read_text())
        assert set(options) <= set(known), script
