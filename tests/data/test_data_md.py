"""docs/data.md: every layout is documented, and every documented example is read by the layout that it documents."""

import io
import json
import pathlib
import re

import pytest
from command import ROOT
from PIL import Image

from flaxcap.data import datasets
from flaxcap.data.base import Example, Examples
from flaxcap.data.folder import FolderBuilder
from flaxcap.data.layouts.detect import LAYOUTS

TEXT = (ROOT / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:.*\n)+?)(?=## |\Z)", TEXT, re.MULTILINE))


def paths_of(tree: str) -> list[str]:
    """Returns the files of a drawn directory tree."""
    found, folders = [], []
    for line in tree.strip().splitlines()[1:]:
        match = re.fullmatch(r"((?:│   |    )*)[├└]── (\S+)", line)
        assert match, line
        depth = len(match[1]) // 4
        path = "".join(folders[:depth]) + match[2]
        if path.endswith("/"):
            folders = [*folders[:depth], match[2]]
        else:
            found.append(path)
    return found


def build(section: str, folder: pathlib.Path) -> tuple[dict[str, bytes], str]:
    """Writes a section's example. Returns its images by path, and the text of its files of captions."""
    tree, *_ = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    samples = dict(re.findall(r"^`([^`\n]+)`[^\n]*:\n\n```\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    images = {}
    for number, path in enumerate(paths_of(tree)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith((".jpg", ".png")):
            out = io.BytesIO()
            Image.new("L", (9, 9), 20 * number).save(out, "PNG" if path.endswith("png") else "JPEG")
            images[path] = out.getvalue()
            (folder / path).write_bytes(images[path])
        else:
            assert len(samples[path].splitlines()) >= 1
            (folder / path).write_text(samples.pop(path))
    assert samples == {}, "samples of files that are not in the tree"
    return images, "".join(p.read_text() for p in folder.rglob("*") if p.suffix in (".txt", ".csv", ".json", ".jsonl"))


def test_every_layout_is_documented():
    assert list(SECTIONS) == [layout.name for layout in LAYOUTS]
    assert "[docs/data.md](docs/data.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_the_example_is_read_by_its_layout(layout, tmp_path):
    section, folder = SECTIONS[layout.name], tmp_path / "DIR"
    images, text = build(section, folder)
    assert FolderBuilder(manual_dir=folder, data_dir=tmp_path / "data")._source().layout is layout
    builder = datasets.prepare("folder", tmp_path / "data", manual_dir=folder)
    found: dict[str, list[Example]] = {split: list(Examples(builder, split)) for split in builder.info.splits}
    examples = [example for some in found.values() for example in some]
    assert sorted(example.image for example in examples) == sorted(images.values())
    for example in examples:
        assert example.captions
        for caption in example.captions:
            assert caption in text or json.dumps(caption) in text
            assert caption.strip("\"'|0123456789") == caption
    (splits,) = re.findall(r"^Splits: (.+)$", section, re.MULTILINE)
    documented = ["train", "val"] if splits == "by a hash" else splits.split(", ")
    assert sorted(found) == sorted(documented)
