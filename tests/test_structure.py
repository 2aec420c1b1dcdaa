"""Sizes of files and functions, and the form of docstrings."""

import ast
import io
import pathlib
import re
import tokenize

import pytest
from command import ROOT

PACKAGE = ROOT / "flaxcap"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 300, 60
LONG_FUNCTIONS = {"beam_search"}
# A docstring names the thing or begins with a verb. These beginnings lean on something that is not there.
FORBIDDEN = ("What", "How", "Of", "The same", "The others", "Whether", "Likewise")
BACKTICKS = re.compile(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`")


def ids(files: list[pathlib.Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def test_the_package_root_has_at_most_six_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert not [file for file in FILES if file.name == "utils.py"]


def test_every_public_class_name_has_one_owner():
    owners: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners.setdefault(node.name, []).append(file.name)
    assert {name: files for name, files in owners.items() if len(files) > 1} == {}


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.name not in LONG_FUNCTIONS
    }
    assert {name: lines for name, lines in long.items() if lines > MOST_FUNCTION_LINES} == {}


def docstrings(tree: ast.AST) -> list[str]:
    """Returns the docstrings of a module, and of its classes and functions."""
    found = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return [text for text in found if text]


def badly_begun(text: str) -> list[str]:
    """Returns the first words of docstrings with a forbidden beginning."""
    pattern = re.compile(rf"({'|'.join(FORBIDDEN)})\b")
    return [doc[:60] for doc in docstrings(ast.parse(text)) if pattern.match(doc)]


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_docstrings_begin_with_the_thing_or_a_verb(file):
    assert badly_begun(file.read_text()) == []


def test_forbidden_beginnings_are_found():
    assert badly_begun('"""What a module is."""\ndef f():\n    """Returns it."""') == ["What a module is."]
    assert badly_begun('def f():\n    """The same, again."""\nclass A:\n    """Offers."""') == ["The same, again."]


def comments_of(text: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def known_names() -> set[str]:
    """Returns the identifiers in the code of the repository, and the words of its strings but for docstrings."""
    found: set[str] = set()
    for file in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        tree = ast.parse(file.read_text())
        docs = {node.body[0].value for node in ast.walk(tree) if _has_docstring(node)}  # pyright: ignore
        found |= {file.stem, file.parent.name}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.arg | ast.keyword):
                found.add(node.arg or "")
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.alias):
                found |= {*node.name.split("."), node.asname or ""}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
                found |= set(re.findall(r"\w+", node.value))
    return found


def _has_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None


def unknown_names(text: str, known: set[str]) -> list[str]:
    """Returns the names in backticks, in docstrings and comments, with a part that is not known."""
    prose = [*docstrings(ast.parse(text)), *comments_of(text)]
    names = [match[1] for part in prose for match in BACKTICKS.finditer(part)]
    return [name for name in names if not set(name.strip(".").split(".")) <= known]


@pytest.fixture(scope="module")
def known() -> set[str]:
    return known_names()


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_names_in_backticks_exist(file, known):
    assert unknown_names(file.read_text(), known) == []


def test_a_name_that_does_not_exist_is_found(known):
    gone = "no_such_" + "function"
    assert unknown_names(f'"""Calls `{gone}(x)` and `jax.jit`."""', known) == [gone]
    assert unknown_names(f"x = 1  # see `loop.{gone}`", known) == [f"loop.{gone}"]
