"""The shape of the package: who may import whom, and what is never imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

import flaxcap

PACKAGE = pathlib.Path(flaxcap.__file__).parent

# Data flow downwards: a module imports only what stands above it.
ORDER = [
    "flaxcap", "errors", "huge_pages", "limits", "config", "presets", "runtime", "checksums", "processes", "lock",
    "data.base", "data.coco_captions", "data.flickr8k", "data.folder", "data.shapes", "data",
    "encoders", "encoders.headers", "encoders.images",
    "encoders.pooling", "encoders.winograd", "encoders.inception_v3", "encoders.weights",
    "text", "split", "store", "features", "embeddings",
    "metrics.ptb", "metrics.ngrams", "metrics.bleu", "metrics.cider", "metrics.rouge", "metrics",
    "metrics.health", "metrics.java", "scores",
    "batches", "memory",
    "linear", "attention", "cell", "loss", "model", "noise", "objective", "train_step", "feed", "checkpoint",
    "decode.step", "decode.sample", "decode.beam", "decode", "self_critical", "validation",
    "finetune", "logs", "loop", "plots", "fetch", "export",
    "start", "describe", "mend", "prepare", "verify", "train", "caption", "evaluate",
    "bench.work", "bench.corpus", "bench.flops", "bench.machine", "bench.peers",
    "bench.train", "bench.decode", "bench.extract", "bench.inputs", "bench.score", "bench",
    "commands", "main",
]  # fmt: skip

# The stages; the features on disk stand between the second and the third.
STAGES = {
    "data": {"data.base", "data.coco_captions", "data.flickr8k", "data.folder", "data.shapes", "data"},
    "encoding": {
        "encoders.headers",
        "encoders.images",
        "encoders.pooling",
        "encoders.winograd",
        "encoders.inception_v3",
        "encoders.weights",
        "features",
    },
    "training": {
        "batches",
        "memory",
        "linear",
        "attention",
        "cell",
        "loss",
        "model",
        "noise",
        "objective",
        "train_step",
        "feed",
        "checkpoint",
        "decode",
        "decode.step",
        "decode.sample",
        "decode.beam",
        "self_critical",
        "validation",
    },
}
JOINERS = {
    *("describe", "mend", "prepare", "verify", "finetune", "start", "train", "evaluate", "caption", "main", "export"),
    "bench",
}
# A size is shared: the positions of the grid.
SIZES = {("model", "encoders.inception_v3"), ("split", "encoders.inception_v3")}


def name_of(file: pathlib.Path) -> str:
    """ "data.base" of flaxcap/data/base.py, "data" of flaxcap/data/__init__.py, "flaxcap" of the package itself."""
    return ".".join(p for p in file.relative_to(PACKAGE).with_suffix("").parts if p != "__init__") or "flaxcap"


SOURCES = {name_of(file): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}


def absolute(name: str) -> list[str]:
    """The full names of all that a module imports, inside functions too."""
    found = []
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    # importlib.import_module("flaxcap.data.shapes"), and f"flaxcap.data.{dataset}" for any of them
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            text = ast.unparse(node.args[0]).removeprefix("f").strip("'").partition("{")[0]
            found += [f"flaxcap.{module}" for module in SOURCES if f"flaxcap.{module}".startswith(text)]
    return found


def imported(name: str) -> set[str]:
    """The modules of flaxcap that a module imports."""
    own = {full.removeprefix("flaxcap.") for full in absolute(name)} & set(SOURCES)
    # `from flaxcap import config` names the package only to name the module.
    return own - {"flaxcap", name, name.partition(".")[0]}


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(SOURCES)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_above_it(name):
    below = set(ORDER[ORDER.index(name) :])
    assert not imported(name) & below


def test_the_imports_are_seen():
    assert imported("decode.step") == {"cell", "loss", "model", "text"}
    assert imported("data") == STAGES["data"] - {"data"} | {"config"}
    assert imported("main") >= JOINERS - {"main", "finetune", "start", "describe", "mend"}


@pytest.mark.parametrize("name", sorted(set(ORDER) - JOINERS))
def test_only_those_that_join_stages_do(name):
    touched = {
        stage
        for stage, modules in STAGES.items()
        for module in {name, *imported(name)} & modules
        if (name, module) not in SIZES
    }
    assert len(touched) <= 1
    assert not imported(name) & JOINERS


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh process has imported after running `code`."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    command = [sys.executable, "-W", "error", "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return {name.partition(".")[0] for name in found.stdout.split()}


def test_neither_tensorflow_nor_torch_is_imported():
    names = [name if name == "flaxcap" else f"flaxcap.{name}" for name in ORDER]
    found = modules_after("import " + ", ".join(names))
    assert {"flaxcap", "jax", "tensorflow_datasets", "orbax", "h5py", "matplotlib"} <= found
    assert not found & {"tensorflow", "torch", "keras", "dill", "cloudpickle"}


def test_help_is_quick():
    found = modules_after("from flaxcap.main import main; main(['train', '--help']); main(['trian'])")
    assert "flaxcap" in found
    assert not found & {"jax", "numpy", "tensorflow_datasets", "orbax", "matplotlib"}
