"""Imports go one way, from package to package; some modules are never imported."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import flaxcap

PACKAGE = pathlib.Path(flaxcap.__file__).parent

# A package imports only the packages before it.
ORDER = [
    "errors", "fields", "config", "runtime", "files", "presets", "text", "images", "data", "encoders",
    "features", "input_pipeline", "models", "decoding", "metrics", "training", "inference", "bench", "commands",
    "__main__", "flaxcap",  # the public names; each is imported at first use
]  # fmt: skip


def name_of(file: pathlib.Path) -> str:
    """Returns "data.base" for flaxcap/data/base.py, and "data" for flaxcap/data/__init__.py."""
    return ".".join(p for p in file.relative_to(PACKAGE).with_suffix("").parts if p != "__init__") or "flaxcap"


SOURCES = {name_of(file): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}


def absolute(name: str) -> list[str]:
    """Returns the full names of everything that a module imports, inside functions too."""
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
    """Returns the modules of flaxcap that a module imports."""
    own = {full.removeprefix("flaxcap.") for full in absolute(name)} & set(SOURCES)
    # `from flaxcap import config` names the package only to name the module.
    return own - {"flaxcap", name, *(".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1))}


def package_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_package_has_its_place():
    assert sorted(ORDER) == sorted({package_of(name) for name in SOURCES})


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_import_goes_upwards(name):
    later = ORDER[ORDER.index(package_of(name)) + 1 :]
    assert not {other for other in imported(name) if package_of(other) in later}


def test_no_modules_import_each_other():
    graphlib.TopologicalSorter({name: imported(name) for name in SOURCES}).prepare()


def test_the_imports_are_seen():
    assert {package_of(name) for name in imported("decoding.beam_search")} == {"config", "decoding", "text"}
    assert imported("commands.main") >= {"commands.train", "commands.flags", "errors"}
    assert imported("data.datasets") >= {"data.base", "data.shapes", "config"}


def modules_after(code: str) -> set[str]:
    """Returns the top-level modules that a fresh process has imported after running `code`."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    command = [sys.executable, "-W", "error", "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return {name.partition(".")[0] for name in found.stdout.split()}


def test_neither_tensorflow_nor_torch_is_imported():
    names = [name if name == "flaxcap" else f"flaxcap.{name}" for name in SOURCES]
    found = modules_after("import " + ", ".join(names))
    assert {"flaxcap", "jax", "tensorflow_datasets", "orbax", "matplotlib"} <= found
    assert not found & {"tensorflow", "torch", "keras", "dill", "cloudpickle", "h5py"}


def test_help_is_quick():
    found = modules_after("from flaxcap.commands.main import main; main(['train', '--help']); main(['trian'])")
    assert "flaxcap" in found
    assert not found & {"jax", "numpy", "tensorflow_datasets", "orbax", "matplotlib"}
