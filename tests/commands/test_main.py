"""The command line: its output, the files it writes, and its exit status."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from command import flaxcap
from PIL import Image
from trained import Trained, tiny_config

from flaxcap import presets
from flaxcap.commands import main as main_lib
from flaxcap.commands.main import main
from flaxcap.training import logs


@pytest.fixture
def refused(capsys):
    """Runs a command line that must fail with one line on stderr, and returns the line."""

    def run(*args) -> str:
        assert main([str(a) for a in args]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"flaxcap {args[0]}: ")
        assert err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "images" / "an image.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(path)
    return path


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian", "--workdir=x"]) == 1
    message = "flaxcap: unknown command 'trian' (`flaxcap --help` lists them); did you mean 'train'?\n"
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("prepare", "--config is missing: the preset"),
        ("train --workdir=w", "--config is missing: the preset"),
        ("train --config=p", "--workdir is missing: the run"),
        ("export --workdir=w", "--out is missing: the new directory"),
        ("evaluate", "no model is named: give --workdir=RUN or --model=EXPORT"),
        ("caption a.jpg", "no model is named: give --workdir=RUN or --model=EXPORT"),
        ("prepare --config", "Missing value for flag --config"),
        ("prepare --config=nowhere.py", "--config=nowhere.py: no such file; presets are experiments/NAME.py"),
        ("prepare --config=.", "--config=.: a preset is a .py or a .json file"),
        ("prepare --conf=p", "Unknown command line flag 'conf'. Did you mean: config"),
        ("prepare --workdir=w --config=p", "Unknown command line flag 'workdir'"),
        (
            "train --config=p --workdir=w --manual_dir=d",
            "Unknown command line flag 'manual_dir'. Did you mean: data_dir ? It is a flag of `flaxcap prepare`,"
            " `flaxcap evaluate`; `flaxcap train` reads what `flaxcap prepare` wrote to --data_dir",
        ),
        ("prepare --config=p --beam_width=3", "Unknown command line flag 'beam_width'\n"),
        ("prepare p.py", "unexpected 'p.py'; values are given as --flag=value"),
        ("prepare --config=p --num_workers=0", "--num_workers=0"),
        ("prepare --config=p --distributed=host:1,2", "--distributed=host:1,2: expected auto, or COORDINATOR:PORT,"),
        ("prepare --config=p --distributed=host:1,2,x", "--distributed=host:1,2,x: expected auto, or "),
        ("prepare --config=p --max_bad_fraction=1.5", "--max_bad_fraction=1.5"),
        ("evaluate --workdir=w --split=dev", "--split=dev: value should be one of <train|val|test>"),
        ("evaluate --workdir=nowhere", "nowhere: no config.json: neither a run nor an export"),
        ("evaluate --workdir=.", ".: no config.json: neither a run nor an export"),
        ("caption a.jpg --model=nowhere", "nowhere: no config.json: neither a run nor an export"),
        ("export --workdir=. --out=o", ".: no config.json: neither a run nor an export"),
    ],
)
def test_missing_and_unexpected_arguments(args, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*args.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=x", "--config.train.epochs=x: expected a whole number"),
        ("train.epochs=1.5", "--config.train.epochs=1.5: expected a whole number"),
        ("train.epochs=", "--config.train.epochs=: expected a whole number"),
        ("train.learning_rate=fast", "--config.train.learning_rate=fast: expected a number"),
        ("model.positions=maybe", "--config.model.positions=maybe: expected true or false"),
        ("train.epochs", "expected --config.train.epochs=VALUE, where VALUE is a whole number"),
        ("train.epochs=0", "--config.train.epochs=0 and cider_epochs=0: expected more than 0 of either"),
        ("train.learning_rate=nan", "--config.train.learning_rate=nan: expected more than 0"),
        ("model.cell=lsmt", "--config.model.cell=lsmt: expected one of gru, lstm; did you mean 'lstm'?"),
        ("encoder.block=mixed11", "--config.encoder.block=mixed11: expected one of mixed0, mixed1, "),
        ("dataset=shape", "--config.dataset=shape: expected one of coco_captions, flickr8k, folder, shapes"),
        ("train.epoch=3", "--config.train.epoch: no such field (`flaxcap train --help` lists them); did you mean "),
        ("epochs=3", "did you mean 'train.epochs'?"),
        ("train=3", "it is a group, as in 'train.batch_images'"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named(override, message, refused, tmp_path):
    preset = tmp_path / "preset.json"
    preset.write_text(presets.to_json(tiny_config()))
    assert message in refused("train", f"--config={preset}", f"--workdir={tmp_path}/run", f"--config.{override}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.py", "get = 1", "has no get_config()"),
        ("p.py", "def get_config():\n  return {}", "get_config() gave dict, not flaxcap.config.Config"),
        ("p.py", "\ndef get_config(:", "SyntaxError: invalid syntax (p.py, line 2)"),
        ("p.py", "import re\nimport flaxcupp", "line 2: ModuleNotFoundError: No module named 'flaxcupp'"),
        ("p.py", "get_config = lambda: Config(train=Train(epochs='3'))", "train: epochs is '3', expected int"),
        ("p.py", "get_config = lambda: Config(train=3)", "train: found int, expected an object"),
        ("p.py", "get_config = lambda: Config(train=Train(epoch=3))",
         "line 2: TypeError: Train.__init__() got an unexpected keyword argument 'epoch'; did you mean 'train.epochs'"),
        ("p.json", '{"train": {"epoch": 3}}', "train: unknown field 'epoch'; did you mean 'epochs'?"),
        ("p.json", '{"train": {"epochs": true}}', "train: epochs is True, expected int"),
        ("p.json", '{"train": ', "not JSON (Expecting value"),
        ("p.json", "\udcff", "not JSON ('utf-8' codec"),
        ("p.yaml", "train: {}", "a preset is a .py or a .json file"),
    ],
)  # fmt: skip
def test_a_bad_preset_is_named(name, text, message, refused, tmp_path):
    imports = "from flaxcap.config import Config, Train\n" if "lambda" in text else ""
    (tmp_path / name).write_text(imports + text, errors="surrogateescape")
    err = refused("prepare", f"--config={tmp_path / name}")
    assert message in err
    assert str(tmp_path / name) in err


def test_a_preset_of_any_kind_can_be_overridden(tmp_path, refused):
    (tmp_path / "p.py").write_text(
        "from flaxcap.config import Config, Shapes, Data\n"
        "def get_config():\n    return Config(dataset='shapes', data=Data(shapes=Shapes(num_train=7)))\n"
    )
    arguments = [f"--config={tmp_path}/p.py", f"--workdir={tmp_path}/run", f"--data_dir={tmp_path}"]
    names = {
        refused("train", *arguments, *more)
        for more in ([], ["--config.data.shapes.num_train=8"], ["-config.encoder.block=mixed3"])
    }
    assert len(names) == 3  # each override changes the store's name
    assert all("no prepared features at" in name for name in names)
    assert all("; give the --data_dir that holds them, or `flaxcap prepare` computes them" in name for name in names)


def test_an_unwritable_output_is_named(trained: Trained, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    paths = [f"--data_dir={trained.data_dir}", f"--workdir={trained.workdir}"]
    assert f"{tmp_path}/file" in refused("export", *paths, f"--out={tmp_path}/file/export")
    assert f"--out={tmp_path}/file" in refused("export", *paths, f"--out={tmp_path}/file")
    config = f"--config={trained.preset}"
    assert f"{tmp_path}/file" in refused("train", config, paths[0], f"--workdir={tmp_path}/file/run")


def test_prepare_and_train_in_processes_of_their_own(trained: Trained, tmp_path):
    data = tmp_path / "data"
    found = flaxcap("prepare", f"--config={trained.preset}", f"--data_dir={data}", "--num_workers=1")
    assert (found.returncode, found.stderr) == (0, "")
    (store,) = (data / "features").iterdir()
    assert found.stdout.splitlines()[-1] == f"prepared: {store}"
    assert re.search(r"^train: 32 images with features, 0 skipped$", found.stdout, re.MULTILINE)

    workdir = tmp_path / "run"
    found = flaxcap(
        "train", f"--config={trained.preset}", f"--data_dir={data}", f"--workdir={workdir}", "--config.train.epochs=1"
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert re.search(r"^epoch 1: validation loss \d\.\d{4}, ", found.stdout, re.MULTILINE)
    assert str(workdir) in found.stdout.splitlines()[-1]
    assert {"config.json", "vocabulary.json", "checkpoints", "metrics.jsonl", "loss.png"} <= set(os.listdir(workdir))
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 1


def test_a_run_is_evaluated_captioned_and_exported_by_processes(trained: Trained, image, tmp_path):
    run = [f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}"]
    found = flaxcap("evaluate", *run, "--split=test", f"--out_dir={tmp_path}/scores")
    assert (found.returncode, found.stderr) == (0, "")
    report = json.loads((tmp_path / "scores" / "scores.json").read_text())
    said = dict(line.split(None, 1) for line in found.stdout.splitlines()[:-1])
    expected = {name: f"{value:.4f}" for name, value in report["scores"].items()}
    expected |= {name: f"none: {reason}" for name, reason in report["missing"].items()}
    assert said == expected | {"scores": "count words"}
    predictions = json.loads((tmp_path / "scores" / "predictions.json").read_text())
    assert len(predictions) == 8
    assert all(type(p["image_id"]) is int and p["caption"] for p in predictions)

    found = flaxcap("export", *run, f"--out={tmp_path}/exported")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"exported to {tmp_path}/exported\n"

    found = flaxcap("caption", image, f"--model={tmp_path}/exported", "--plot", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    line, plot = found.stdout.splitlines()
    assert re.fullmatch(rf"{re.escape(str(image))}: a [a-z ]+  \(log-probability -\d+\.\d\d\)", line)
    with Image.open(tmp_path / plot.strip()) as drawing:
        assert drawing.format == "PNG"


@pytest.mark.parametrize(
    "args",
    ["caption nothere.jpg --model=nowhere", "train --config=nowhere.py --workdir=w", "evaluate --helpp", "prepared"],
)
def test_a_process_ends_with_one_line_and_status_1(args, tmp_path):
    found = flaxcap(*args.split(), cwd=tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert re.fullmatch(r"flaxcap.*: .+\n", found.stderr)


def test_unreadable_images_are_named_on_stderr(trained: Trained, image, tmp_path, capsys):
    bad = tmp_path / "images" / "bad.jpg"
    bad.write_bytes(b"no image")
    paths = [f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}"]
    assert main(["caption", str(image.parent), *paths]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{image}: a ")
    assert err.startswith(f"{bad}: not an image")
    assert out.count("\n") == err.count("\n") == 1


def test_overrides_may_change_decoding_but_not_the_model(trained: Trained, image, capsys, refused):
    command = ["caption", str(image), f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}"]
    assert main([*command, "--config.decode.max_length=2", "--config.encoder.batch_size=2"]) == 0
    assert re.search(r"image.png: \w+  \(", capsys.readouterr().out)
    assert "model.hidden_dim was 32, is 64" in refused(*command, "--config.model.hidden_dim=64")
    assert "name images to caption" in refused(*command, "--split=test")
    assert "name images to caption" in refused(command[0], *command[2:])
    assert main([*command, "nothere.png"]) == 1  # the other image is captioned
    out, err = capsys.readouterr()
    assert out.startswith(f"{image}: ")
    assert err == "nothere.png: no such file or directory, and not an http(s) address\n"


def test_images_of_the_data_set(trained: Trained, tmp_path, capsys):
    paths = [f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}", f"--out_dir={tmp_path}/plots"]
    assert main(["caption", "--split=val", "--num_images=2", "--plot", *paths]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    plots = sorted(str(path) for path in (tmp_path / "plots").iterdir())
    assert [line.strip() for line in out.splitlines()[1::2]] == plots
    assert [line.partition(":")[0] for line in out.splitlines()[::2]] == ["val-00000.jpg", "val-00001.jpg"]


def test_a_preempted_run_asks_to_be_started_again(trained: Trained, tmp_path, capsys, monkeypatch):
    write = logs.Metrics.write

    def write_and_signal(metrics, step, values):
        write(metrics, step, values)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logs.Metrics, "write", write_and_signal)
    handler = signal.getsignal(signal.SIGTERM)
    arguments = [f"--config={trained.preset}", f"--data_dir={trained.data_dir}", f"--workdir={tmp_path}/run"]
    assert main(["train", *arguments]) == 75
    out, err = capsys.readouterr()
    assert re.search(r"^flaxcap train: saved at step 12 of 40; the same command resumes there$", out, re.MULTILINE)
    assert err == ""
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()


def test_a_closed_pipe_and_an_interrupt_leave_no_traceback(monkeypatch, capsys):
    command = [sys.executable, "-m", "flaxcap", "train", "--help"]
    gone = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert gone.stdout
    assert gone.stderr
    gone.stdout.close()
    assert gone.wait(60) == main_lib.FAILED
    assert gone.stderr.read() == ""
    gone.stderr.close()

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_lib, "main", interrupted)
    with pytest.raises(SystemExit) as end:
        main_lib.run()
    assert end.value.code == 130
    assert "interrupted" in capsys.readouterr().err
