"""Nothing that is read is executed: no module of flaxcap unpickles or evaluates, and no program of it does."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_imports import ORDER, SOURCES, absolute
from trained import Trained

from flaxcap.inference import export, loading

# Modules that turn bytes into programs or into objects of any class.
RUNNING = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tensorflow", "torch", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
READERS = {"load", "read_array", "fromfile", "genfromtxt"}  # NumPy functions that can unpickle, or that hide the format


@pytest.mark.parametrize("name", ORDER)
def test_no_module_can_execute_data(name):
    roots = {full.partition(".")[0] for full in absolute(name)}
    assert not roots & RUNNING
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Call):
            assert not bad_call(node), f"{name}:{node.lineno}: {ast.unparse(node)}"


def bad_call(node: ast.Call) -> bool:
    called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    owner, _, attribute = called.rpartition(".")
    if called in FORBIDDEN_CALLS or options.get("shell", "False") != "False":
        return True
    if owner.partition(".")[0] in ("np", "numpy") and attribute in READERS:
        return options.get("allow_pickle") != "False"
    return "allow_pickle" in options and options["allow_pickle"] != "False"


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("np.load(f)", True),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f, allow_pickle=False)", False),
        ("np.lib.format.read_array(f)", True),
        ("np.lib.format.read_array(f, allow_pickle=False)", False),
        ("format.read_array(f, allow_pickle=x)", True),
        ("np.savez(f, allow_pickle=True)", True),
        ("presets.load(f)", False),
        ("subprocess.run(c, shell=True)", True),
        ("eval(c)", True),
        ("re.compile(c)", False),
    ],
)
def test_bad_calls_are_recognised(text, bad):
    (node,) = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    assert bad_call(node) == bad


# Runs a program. Python's audit events report every class that is unpickled and every process that is started.
WATCHED = """
import sys
def watch(event, args):
    if event in {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}:
        if args[0] != "uname":  # the standard library's `platform` asks it for the processor
            print(event, args, file=sys.stderr)
sys.addaudithook(watch)
from flaxcap.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def watched(*args: object) -> str:
    """Returns a report of what a flaxcap program unpickled or started."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", WATCHED, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_pickle_is_reported():
    code = (
        WATCHED.partition("from flaxcap")[0]
        + "import pickle, collections; pickle.loads(pickle.dumps(collections.Counter))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == "pickle.find_class ('collections', 'Counter')\n"


def test_no_program_unpickles_or_starts_anything(trained: Trained, tmp_path):
    """Prepares captions, images and feature maps, exports a run, and captions with the export."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for n, split in enumerate(("train", "val")):
        Image.fromarray(np.full((70, 90, 3), 40 * n, np.uint8)).save(pictures / f"{n}.png")
        np.save(pictures / f"{n}.png.npy", np.zeros((64, 5), np.float32))
        rows.append({"image": f"{n}.png", "caption": "a dog", "split": split})
    (pictures / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps({"dataset": "folder", "data": {"test_split": ""}}))
    given = [f"--config={preset}", f"--manual_dir={pictures}", f"--npy_dir={pictures}", f"--data_dir={tmp_path}/data"]
    assert watched("prepare", *given) == ""

    run = [f"--workdir={trained.workdir}", f"--data_dir={trained.data_dir}"]
    assert watched("export", *run, f"--out={tmp_path}/exported") == ""
    images = sorted(pictures.glob("*.png"))
    assert watched("caption", *images, f"--model={tmp_path}/exported") == ""


def test_python_beside_an_export_is_not_run(trained: Trained, tmp_path, monkeypatch):
    """A preset in Python is a program. The files of a model are read as JSON only."""
    path = tmp_path / "model"
    export.write(loading.load_run(trained.workdir, trained.data_dir), path)
    mark = tmp_path / "was run"
    for name in ("config.py", "conftest.py", "sitecustomize.py", "decoder/__init__.py"):
        (path / name).write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit")
    shutil.copy(path / "config.py", path / "config.json.py")
    monkeypatch.chdir(path)
    loading.load_export(pathlib.Path())
    assert not mark.exists()
