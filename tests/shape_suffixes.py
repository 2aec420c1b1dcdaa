"""Compares the letters at the end of names with the shapes of the arrays that they name, while functions run.

flaxcap/__init__.py holds the glossary of the letters.
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import flaxcap

# The letters and digits after the last underscore. A lower-case letter stands before them: constants have none.
SUFFIX = re.compile(r"^_*[a-z]\w*_([A-Z0-9]*[A-Z][A-Z0-9]*)$")
FILES = {
    ".".join(file.relative_to(pathlib.Path(flaxcap.__file__).parent.parent).with_suffix("").parts): file
    for file in pathlib.Path(flaxcap.__file__).parent.rglob("*.py")
}


def suffix_of(name: str) -> str:
    """Returns "IPF" for "feats_IPF", and "" for a name without a suffix."""
    match = SUFFIX.match(name)
    return match[1] if match else ""


def glossary() -> dict[str, str]:
    """Returns {letter: meaning and size} of the package's docstring."""
    entries = re.findall(r"^    ([A-Z](?:, [A-Z])*) {2,5}(\S.*)$", flaxcap.__doc__ or "", re.MULTILINE)
    return {letter: meaning for letters, meaning in entries for letter in letters.split(", ")}


class Recorder:
    """A context manager that checks the local variables of functions when they return.

    Checked are arrays, the arrays in lists and tuples, the fields of NamedTuples, and the attributes of `self`. Of the
    result only the fields of NamedTuples are checked: it has no name.
    """

    def __init__(self, modules: tuple[str, ...], sizes: Mapping[str, set[int]]):
        """Prepares the checks.

        Args:
          modules: functions are checked in modules whose names begin with one of these.
          sizes: the sizes that each letter may have.
        """
        self.modules, self.sizes = modules, sizes
        self.wrong: set[str] = set()
        self.checked: set[tuple[str, str]] = set()  # (module, name)
        self._is_ours: dict[Any, bool] = {}  # by code object: most functions that return are JAX's

    def __enter__(self) -> "Recorder":
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _on_event(self, frame: Any, event: str, result: Any) -> None:
        if event != "return":
            return
        code = frame.f_code
        if code not in self._is_ours:
            self._is_ours[code] = frame.f_globals.get("__name__", "").startswith(self.modules)
        if self._is_ours[code]:
            module = frame.f_globals["__name__"]
            where = f"{module}.{getattr(code, 'co_qualname', code.co_name)}"
            self._check(module, where, "", result)
            for name, value in list(frame.f_locals.items()):
                self._check(module, where, name, value)
                if name == "self" and not hasattr(value, "_fields"):
                    for attribute, held in list(getattr(value, "__dict__", {}).items()):
                        self._check(module, where, attribute, held)

    def _check(self, module: str, where: str, name: str, value: Any) -> None:
        fields = getattr(value, "_fields", ())  # of a NamedTuple
        if isinstance(value, tuple) and fields:
            for field, held in zip(fields, value, strict=True):
                self._check(type(value).__module__, f"{where}: {type(value).__name__}", field, held)
        elif isinstance(value, list | tuple):
            for held in value:
                self._check(module, where, name, held)
        elif (suffix := suffix_of(name)) and isinstance(getattr(value, "shape", None), tuple):
            self.checked.add((module, name))
            if not self._agrees(suffix, value.shape):
                self.wrong.add(f"{where}: {name} has the suffix {suffix} and the shape {list(value.shape)}")

    def _agrees(self, suffix: str, shape: tuple[int, ...]) -> bool:
        allowed = ({int(c)} if c.isdigit() else self.sizes.get(c, set()) for c in suffix)
        return len(suffix) == len(shape) and all(n in some for n, some in zip(shape, allowed, strict=True))


def names_in(tree: ast.AST) -> Iterator[str]:
    """Yields every identifier of a module's code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def assigned_in(tree: ast.AST) -> set[str]:
    """Returns the names with a suffix that a module gives to arrays: arguments, variables, fields and attributes.

    Python 3.12 hides the variables of comprehensions from `Recorder`, so these are left out.
    """
    inner = {name for node in ast.walk(tree) if isinstance(node, ast.comprehension) for name in ast.walk(node.target)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in inner:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if suffix_of(name)}
