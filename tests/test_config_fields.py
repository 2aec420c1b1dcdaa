"""No field of a preset is unused: flaxcap reads each one by name."""

import ast
import dataclasses
import inspect
import typing

from conftest import ROOT

from flaxcap import config as config_lib
from flaxcap.data import shapes

GROUPS = {name: cls for name, cls in vars(config_lib).items() if dataclasses.is_dataclass(cls)}


class Reads(ast.NodeVisitor):
    """Collects the fields that a module reads, as (class, field), from annotations, assignments and attributes."""

    def __init__(self):
        self.found: set[tuple[str, str]] = set()
        self.scopes: list[dict[str, str]] = [{}]
        self.kinds = {name: name for name in GROUPS}
        self.attributes: dict[str, dict[str, str]] = {}  # class of the module -> attribute -> class of config.py

    def of(self, node: ast.AST) -> str | None:
        """Returns the name of an expression's class, if it is a class of config.py."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.of(ast.Name(f"self.{node.attr}"))
            owner = self.of(node.value)
            if owner in self.attributes:
                return self.attributes[owner].get(node.attr)
            if owner is not None:
                hint = typing.get_type_hints(GROUPS[owner]).get(node.attr)
                return next((name for name, cls in GROUPS.items() if cls is hint), None)
            return "Config" if node.attr == "config" else None
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom):
        if node.module == "flaxcap.config":
            self.kinds |= {alias.asname: alias.name for alias in node.names if alias.asname and alias.name in GROUPS}

    def visit_ClassDef(self, node: ast.ClassDef):
        hints = {ast.unparse(n.target): ast.unparse(n.annotation) for n in node.body if isinstance(n, ast.AnnAssign)}
        self.kinds[node.name] = node.name
        self.attributes[node.name] = {name: self.kinds[hint] for name, hint in hints.items() if hint in self.kinds}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute):
        owner = self.of(node.value)
        if owner in GROUPS and isinstance(node.ctx, ast.Load):
            self.found.add((owner, node.attr))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign):
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if (kind := self.of(value)) is not None:
                    # Attributes of self are visible in the complete file: only one class of a file has a preset.
                    scope = self.scopes[0] if isinstance(name, ast.Attribute) else self.scopes[-1]
                    scope[ast.unparse(name)] = kind

    def visit_FunctionDef(self, node: ast.FunctionDef):
        hints = {arg.arg: ast.unparse(arg.annotation) for arg in node.args.args if arg.annotation}
        names = {name: hint.rsplit(".", 1)[-1] for name, hint in hints.items()}
        self.scopes.append({name: self.kinds[kind] for name, kind in names.items() if kind in self.kinds})
        self.generic_visit(node)
        self.scopes.pop()


def reads(text: str) -> set[tuple[str, str]]:
    reader = Reads()
    reader.visit(ast.parse(text))
    return reader.found


def test_reads_are_found_through_names_and_annotations():
    text = """
def f(config: config_lib.Config, other: int, train: Train):
    d, n = config.data, other.config.seed
    def g():
        return d.shapes.seed, other.epochs, train.dtype
    return d
class A:
    def __init__(self, config: Model):
        self.config = config
    def h(self):
        return self.config.cell, config.epochs
"""
    groups = {("Config", "data"), ("Data", "shapes")}
    fields = {("Config", "seed"), ("Shapes", "seed"), ("Train", "dtype"), ("Model", "cell")}
    assert reads(text) == groups | fields


def test_reads_are_found_through_annotated_attributes_and_renamed_imports():
    parts = "class Parts:\n  config: Train\n  other: int\n"
    read = "def g(parts: Parts):\n  c, o = parts.config, parts.other\n  return c.epochs, parts.config.dtype, o.seed"
    assert reads(f"{parts}{read}") == {("Train", "epochs"), ("Train", "dtype")}
    imports = "from flaxcap.config import Encoder as EncoderConfig\n"
    assert reads(f"{imports}def g(config: EncoderConfig):\n  return config.seed") == {("Encoder", "seed")}


def test_no_field_is_unused():
    files = [path for path in (ROOT / "flaxcap").rglob("*.py") if path.name != "config.py"]
    found = set.union(*(reads(path.read_text()) for path in files))
    # The builder takes these as keyword arguments.
    given = inspect.signature(shapes.ShapesBuilder).parameters
    found |= {("Shapes", f.name) for f in dataclasses.fields(config_lib.Shapes) if f.name in given}
    fields = {(name, field.name) for name, cls in GROUPS.items() for field in dataclasses.fields(cls)}
    assert fields - found == set()
