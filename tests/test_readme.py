"""The README: its Python snippet runs, its links lead somewhere, and its file map is complete."""

import re

import numpy as np
import pytest
from command import ROOT
from PIL import Image
from trained import Trained

README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")]


def test_the_python_snippet_runs(trained: Trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(trained.workdir)
    (tmp_path / "data").symlink_to(trained.data_dir)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    text, first_word = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[a-z ]+ -\d+\.\d+", text)
    assert re.fullmatch(r"[a-z]+ \d+", first_word)


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_file_map_names_every_package():
    packages = {path.parent.name for path in (ROOT / "flaxcap").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)) == packages
