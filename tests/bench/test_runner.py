"""Small real runs of each benchmark: figures that agree with each other, errors, and the command line."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import pytest

from flaxcap import config as config_lib
from flaxcap import presets
from flaxcap.bench import machine, runner, synthetic
from flaxcap.commands.main import main
from flaxcap.config import Config, Data, Decode, Encoder, Model, Train
from flaxcap.features.shards import Split
from flaxcap.files.integrity import WriteError
from flaxcap.models.recurrent import RecurrentDecoder

TINY = Config(
    data=Data(vocab_size=40, max_length=16),
    encoder=Encoder(block="mixed0", image_size=160, batch_size=8, shard_images=16),
    model=Model(image_dim=6, embedding_dim=5, attention_dim=7, hidden_dim=8, head_dim=9),
    train=Train(batch_images=8, num_buckets=2, steps_per_dispatch=2),
    decode=Decode(max_length=5, batch_size=16),
)
GIVEN: dict[str, Any] = {"images": 48, "steps": 4, "warmup": 1, "repeats": 2, "workers": 2}


@pytest.fixture(autouse=True)
def few_small_products(monkeypatch):
    monkeypatch.setattr(machine, "SHAPES", ((64, 32, 16), (32, 32, 32)))


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


def measure(what: str, **changed: Any) -> dict[str, Any]:
    return runner.bench(what, TINY, **(GIVEN | changed))


def line_of(text: str) -> dict[str, Any]:
    """Returns the JSON of the last line of stdout."""
    return json.loads(text.splitlines()[-1])


def check_rates(figures: dict[str, Any]) -> None:
    """Checks that each rate of a group of figures is its count divided by the seconds."""
    counts = [name for name in ("images", "captions", "tokens") if name in figures]
    assert counts
    assert figures["seconds"] > 0
    for name in counts:
        assert figures[f"{name}_s"] == near(figures[name] / figures["seconds"])


def check_common(result: dict[str, Any], what: str, rate: str) -> None:
    assert result["what"] == what
    assert result["device"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": 8}
    assert result["cpu"]["model"]
    assert 1 <= result["cpu"]["usable_cores"] <= result["cpu"]["cores"]
    assert result["versions"].keys() == {"python", "jax", "jaxlib", "numpy", "flaxcap"}
    assert result["versions"]["jax"] == jax.__version__
    assert presets.from_dict(result["config"], "the line") == TINY
    assert result["given"] == {"images": 48, "steps": 4, "warmup": 1, "repeats": 2}
    assert result["memory"]["process_peak_gb"] > 0.01
    first, second = (figures[rate] for figures in result["repetitions"])
    assert result[rate] == result["median"][rate] == near((first + second) / 2)


def test_train(tmp_path, capsys):
    out = tmp_path / "new" / "lines.jsonl"
    result = measure("train", out=str(out))
    check_common(result, "train", "captions_s")

    plan = synthetic.plan(48, TINY)
    dispatches = synthetic.sample(plan, 4)
    counted = synthetic.counts(dispatches)
    sizes = {"positions": 64, "features": 256, "vocabulary": 41}
    flop = 3 * RecurrentDecoder.flops(TINY.model, images=counted["images"], tokens=counted["tokens"], **sizes)
    for figures in result["repetitions"]:
        check_rates(figures)
        # The step computes these two on the device.
        assert (figures["captions"], figures["tokens"]) == (counted["captions"], counted["tokens"])
        assert figures["flop_s"] == near(flop / figures["seconds"])
        assert figures["step_ms"]["mean"] == near(1e3 * figures["seconds"] / 4)
        assert 0 < figures["step_ms"]["p10"] <= figures["step_ms"]["median"] <= figures["step_ms"]["p90"]

    facts = result["facts"]
    lengths = {str(batches[0].tokens_ICT.shape[-1]) for batches in dispatches}
    assert facts["compile_s"].keys() == facts["step_gb"].keys() == lengths
    assert all(value > 0 for value in [*facts["compile_s"].values(), *facts["step_gb"].values()])
    assert facts["padding"] == plan.padding
    assert 0 < facts["padding_of_timed"] < 1
    assert facts["gflop_a_caption"] == near(flop / counted["captions"] / 1e9)

    peak = result["peak"]
    assert len(peak["each"]) == 3  # before, between and after the repetitions
    assert 0 < peak["median_flop_s"] <= peak["best_flop_s"]
    assert peak["fraction_of_best"] == near(result["median"]["flop_s"] / peak["best_flop_s"])
    assert peak["fraction_of_median"] == near(result["median"]["flop_s"] / peak["median_flop_s"])

    printed = capsys.readouterr().out
    assert line_of(printed) == json.loads(json.dumps(result)) == json.loads(out.read_text())
    assert re.search(r"^captions_s +\S+", printed, re.MULTILINE)


def test_decode(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    out.write_text('{"an": "older line"}\n')
    result = measure("decode", out=str(out))
    check_common(result, "decode", "captions_s")
    for figures in result["repetitions"]:
        one = figures["one_image"]
        check_rates(figures)
        check_rates(one)
        assert (figures["captions"], one["captions"]) == (4 * 16, 4)
        assert (figures["tokens"], one["tokens"]) == (4 * 16 * 5, 4 * 5)
        assert one["ms_a_caption"] == near(1e3 / one["captions_s"])
    assert result["facts"]["method"] == "greedy"
    assert "peak" not in result
    older, line = out.read_text().splitlines()
    assert json.loads(older) == {"an": "older line"}
    assert json.loads(line) == line_of(capsys.readouterr().out)


@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram": 1, "min_length": 2, "bad_endings": "of the"}])
def test_decode_by_beam_search(options):
    """Constraints do not shorten the captions: every run does equal work."""
    decode = Decode(method="beam", beam_width=3, max_length=5, batch_size=1, **options)
    beam = dataclasses.replace(TINY, decode=decode)
    result = runner.bench("decode", beam, **GIVEN)
    assert (result["facts"]["method"], result["facts"]["tokens_a_caption"]) == ("beam", 5)
    for figures in result["repetitions"]:
        assert (figures["captions"], figures["tokens"]) == (4, 4 * 5)
        assert "one_image" not in figures  # the batch is one


def test_extract():
    result = measure("extract", steps=2)
    for figures in result["repetitions"]:
        check_rates(figures)
        assert figures["images"] == 2 * 8
        alone = figures["decoding"]
        assert min(figures["network"]["images_s"], *alone.values()) > 0
        threads = figures["threads_that_keep_up"]
        assert threads - 1 < figures["network"]["images_s"] / alone["one_thread_images_s"] <= threads
    assert result["images_s"] == result["median"]["images_s"]
    assert (result["facts"]["batch"], result["facts"]["workers"], result["facts"]["pictures"]) == (8, 2, 48)


def test_score():
    result = measure("score")
    check_common(result, "score", "captions_s")
    assert result["facts"] == {"references": 240}
    for figures in result["repetitions"]:
        check_rates(figures)
        assert figures["captions"] == 48


def test_self_critical():
    result = measure("self_critical")
    check_common(result, "self_critical", "images_s")
    counted = synthetic.counts(synthetic.sample(synthetic.plan(48, TINY), 4))
    for figures in result["repetitions"]:
        check_rates(figures)
        # Padding has no captions; a random model's captions have up to 5 tokens.
        assert (figures["images"], figures["captions"]) == (counted["images"], 5 * counted["images"])
        assert figures["captions"] < figures["tokens"] <= 5 * figures["captions"]
        spent = [figures[f"{part}_s"] for part in ("sampling", "scoring", "training")]
        assert min(spent) > 0
        assert sum(spent) <= figures["seconds"]
        assert figures["host_share"] == near(spent[1] / sum(spent))
    assert result["facts"]["first_dispatch_s"] > 0


def test_training_from_a_store_on_disk(tmp_path, monkeypatch):
    """The features are read from a file, which is deleted at the end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    read = []
    monkeypatch.setattr(Split, "read", lambda self, rows, read_it=Split.read: read.append(1) or read_it(self, rows))
    stream = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, features="stream"))
    given: dict[str, Any] = GIVEN | {"repeats": 1, "peak": False}
    result = runner.bench("train", stream, **given)
    assert result["facts"]["features"] == "streamed"
    assert "peak" not in result
    check_rates(result["repetitions"][0])
    assert len(read) >= 2
    assert list(tmp_path.iterdir()) == []


def test_input(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = measure("input")
    check_common(result, "input", "captions_s")
    counted = synthetic.counts(synthetic.sample(synthetic.plan(48, TINY), 4))
    for figures in result["repetitions"]:
        assert figures["captions_s"] == figures["stream"]["captions_s"]
        for mode in ("stream", "device"):
            check_rates(figures[mode])
            assert {name: figures[mode][name] for name in ("images", "captions", "tokens")}.items() <= counted.items()
            assert figures[mode]["batches_s"] == near(4 / figures[mode]["seconds"])
        # Streaming also sends the features, in bfloat16.
        sent = {mode: 1e9 * figures[mode]["gb_s"] * figures[mode]["seconds"] for mode in ("stream", "device")}
        assert sent["stream"] - sent["device"] == near(4 * 8 * 64 * 256 * 2)
    assert result["facts"]["store_gb"] == near(48 * 64 * 256 * 2 / 1e9)
    assert list(tmp_path.iterdir()) == []


def test_input_without_warmup():
    result = measure("input", warmup=0, repeats=1)
    check_rates(result["repetitions"][0]["stream"])


def test_a_disk_that_is_too_small_is_an_error(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    message = r": found 0\.0 MB free, expected 1\.6 MB for --images=48 \(No space left on device\); set TMPDIR"
    with pytest.raises(WriteError, match=message):
        measure("input")


# The command line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "found nothing, expected one of train, decode, extract, input, score, self_critical"),
        ("train decode", "found train decode, expected one of train, decode, extract, input, score, self_critical"),
        ("trian", "trian: expected one of train, decode, extract, input, score, self_critical; did you mean 'train'?"),
        ("train --steps=0", "flag --steps=0: "),
        ("train --repeats=0", "flag --repeats=0: "),
        ("train --warmup=-1", "flag --warmup=-1: "),
        ("train --images=few", "flag --images=few: "),
        ("train --config=nowhere.py", "--config=nowhere.py: no such file"),
        ("extract --config.encoder.image_size=10", "--config.encoder.image_size=10: "),
        ("train --config.train.batch_images=9", "--config.train.batch_images=9: expected a multiple of the 8 devices"),
        ("train --workdir=w", "Unknown command line flag 'workdir'"),
    ],
)
def test_an_impossible_benchmark_is_an_error_of_one_line(args, message, capsys):
    assert main(["bench", *args.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flaxcap bench: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_unwritable_file_is_an_error_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["bench", "train", f"--out={tmp_path}/file/lines.jsonl"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flaxcap bench: {tmp_path}/file")


def test_the_command_measures_the_default_configuration_or_a_preset(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(runner, "bench", lambda what, config, **options: found.append((what, config, options)))
    preset: pathlib.Path = tmp_path / "tiny.json"
    preset.write_text(presets.to_json(TINY))
    assert main(["bench", "train", "--config.train.batch_images=32", "--steps=30"]) == 0
    assert (
        main(["bench", "decode", f"--config={preset}", "--against=a --b", "--against=c", "--out=o", "--images=9"]) == 0
    )
    (what, config, options), (_, other, others) = found
    assert what == "train"
    assert config == config_lib.check(Config(train=Train(batch_images=32)))
    assert (options["steps"], options["repeats"], options["against"], options["out"]) == (30, 5, [], None)
    assert other == TINY
    assert (others["against"], others["out"], others["images"]) == (["a --b", "c"], "o", 9)
