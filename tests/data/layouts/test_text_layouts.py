"""Layouts whose captions are text: tables, lines, and a file next to each image."""

import pytest
from small_folder import all_captions, captions, examples, write, write_images

from flaxcap.data.base import DataError


def test_commas_in_a_last_column_need_no_quotes(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "b.jpg")
    write(folder / "captions.csv", 'image,caption\na.jpg,one, two , three\nb.jpg,"quoted, too"\nb.jpg,"a ""b"", c"\n')
    assert all_captions(folder) == {"a.jpg": ("one, two , three",), "b.jpg": ("quoted, too", 'a "b", c')}


def test_kaggles_captions_beside_images(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "Images/a.jpg", "Images/b.jpg")
    write(folder / "captions.txt", 'image,caption\na.jpg,A dog , running .\na.jpg,"A dog , again ."\nb.jpg,x\n')
    expected = {"a.jpg": ("A dog , running .", "A dog , again ."), "b.jpg": ("x",)}
    assert all_captions(folder) == expected
    (folder / "captions.txt").rename(folder / "captions.csv")
    assert all_captions(folder) == expected, "captions.csv looks into Images/ too"
    (folder / "captions.csv").unlink()
    write(folder / "captions.txt", "image_name,comment_number,comment\na.jpg,0,One, two\nb.jpg,0,x\n")
    assert all_captions(folder) == {"a.jpg": ("One, two",), "b.jpg": ("x",)}


@pytest.mark.parametrize(
    ("place", "images"),
    [
        ("", "flickr30k_images/"),
        ("", "flickr30k-images/"),
        ("flickr30k_images/", "flickr30k_images/"),
        ("flickr30k_images/", "flickr30k_images/flickr30k_images/"),
    ],
)
def test_flickr30k_and_its_malformed_rows(tmp_path, place, images):
    folder = tmp_path / "in"
    write_images(folder, f"{images}1.jpg", f"{images}2199200615.jpg")
    rows = [
        "image_name| comment_number| comment",
        '1.jpg| 0| A "man" , in | or out , of a room .',
        "1.jpg| 1| 4 dogs run .",
        "2199200615.jpg| 3| A dog runs on green grass .",
        "2199200615.jpg| 4   A dog runs across the grass .",
        "2199200615.jpg| A dog without a number .",
        "2199200615.jpg| | A dog with an empty number .",
        "2199200615.jpg| 4 ",
        "",
    ]
    write(folder / place / "results.csv", "\n".join(rows))
    assert all_captions(folder) == {
        "1.jpg": ('A "man" , in | or out , of a room .', "4 dogs run ."),
        "2199200615.jpg": (
            "A dog runs on green grass .",
            "A dog runs across the grass .",
            "A dog without a number .",
            "A dog with an empty number .",
        ),
    }
    write(folder / place / "results.csv", "\n".join([*rows, "no separator"]))
    with pytest.raises(DataError, match=r'results\.csv, line 10: found "no separator", expected an image\'s name'):
        captions(folder)
    write(folder / place / "results.csv", "image,caption\n1.jpg,x\n")
    with pytest.raises(DataError, match=r'results\.csv, line 1: found "image,caption"'):
        captions(folder)


@pytest.mark.parametrize("place", ["", "data/"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_hugging_faces_folders_of_splits(tmp_path, place, kind):
    folder = tmp_path / "in"
    for split, text in (("train", "One, two"), ("validation", "Three"), ("test", "Four")):
        write_images(folder, f"{place}{split}/0001.png", f"{place}{split}/sub/0002.png")
        if kind == "csv":
            rows = f"file_name,width,text\n0001.png,5,{text}\nsub/0002.png,5,{text}\n0001.png,5,{text} again\n"
        else:
            rows = (
                f'{{"file_name": "0001.png", "text": ["{text}", "{text} again"], "tags": [1]}}\n'
                f'{{"file_name": "sub/0002.png", "text": "{text}"}}\n'
            )
        write(folder / f"{place}{split}" / f"metadata.{kind}", rows)
    assert captions(folder) == {
        split: {f"{place}{sub}/0001.png": (text, f"{text} again"), f"{place}{sub}/sub/0002.png": (text,)}
        for split, sub, text in (
            ("train", "train", "One, two"), ("val", "validation", "Three"), ("test", "test", "Four"),
        )
    }  # fmt: skip


def test_hugging_faces_single_file(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "train/1.png", "test/1.png", "dev/1.png")
    write(folder / "metadata.csv", "file_name,caption\ntrain/1.png,one\ntest/1.png,two\ndev/1.png,three\n")
    assert captions(folder) == {
        "train": {"train/1.png": ("one",)},
        "test": {"test/1.png": ("two",)},
        "val": {"dev/1.png": ("three",)},
    }, "the folders of the images name the splits"
    write(folder / "metadata.csv", "file_name,caption,text\ntrain/1.png,one,two\n")
    with pytest.raises(DataError, match=r"metadata\.csv, line 1: found .*expected the columns file_name, text"):
        captions(folder)
    (folder / "metadata.csv").unlink()
    write(folder / "metadata.jsonl", '{"file_name": "train/1.png", "label": "dog"}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1, field 'text': found the keys 'file_name', 'label'"):
        captions(folder)
    write(folder / "train" / "metadata.jsonl", '{"file_name": "1.png", "text": "dog"}\n')
    with pytest.raises(DataError, match=r"2 layouts: .*\(metadata\.jsonl\); .*\(train/metadata\.jsonl\)"):
        captions(folder)


def test_a_text_file_next_to_each_image(tmp_path, caplog):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "b.PNG", "img/10_dog/c.webp", "alone.jpg")
    write(folder / "a.txt", "\ufefffirst, with a comma\r\n\r\nsecond\r\n")
    write(folder / "b.txt", "one caption without an end of line")
    write(folder / "img/10_dog/c.txt", " deep \n")
    write(folder / "readme.txt", "not a caption")
    found = {name: texts for some in examples(folder).values() for _, _, name, texts in some}
    assert found == {
        "a.jpg": ("first, with a comma", "second"),
        "b.PNG": ("one caption without an end of line",),
        "img/10_dog/c.webp": ("deep",),
    }
    assert "folder: left out 1 text file without an image" in caplog.text
    assert "folder: left out 1 image without a caption" in caplog.text


def test_text_files_in_folders_of_splits(tmp_path):
    folder = tmp_path / "in"
    for split in ("train", "Valid"):
        write_images(folder, f"{split}/1.jpg")
        write(folder / split / "1.txt", f"of {split}")
    assert captions(folder) == {"train": {"train/1.jpg": ("of train",)}, "val": {"Valid/1.jpg": ("of Valid",)}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"captions.csv": "image,caption\na.jpg,x\n", "a.txt": "x"},
            r"2 layouts: captions\.csv \(captions\.csv\); NAME\.txt next to NAME\.jpg \(a\.txt\), expected",
        ),
        (
            {"dataset_flickr8k.json": {"images": []}, "captions.txt": "image,caption\n"},
            r"Karpathy's JSON \(dataset_flickr8k\.json\); Kaggle's captions\.txt \(captions\.txt\)",
        ),
        (
            {"captions.json": {}, "results.csv": "", "metadata.csv": ""},
            r"3 layouts: COCO's captions\.json .*Flickr30k's results\.csv .*Hugging Face's .*\(metadata\.csv\)",
        ),
    ],
)
def test_two_layouts_are_both_named(tmp_path, files, message):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg")
    for name, content in files.items():
        write(folder / name, content)
    with pytest.raises(DataError, match=message):
        captions(folder)


def test_a_json_file_beside_another_layout_is_ignored(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, "a.jpg", "b.jpg")
    write(folder / "dataset_info.json", {"splits": {}})
    write(folder / "captions.csv", "image,caption\na.jpg,x\nb.jpg,y\n")
    assert all_captions(folder) == {"a.jpg": ("x",), "b.jpg": ("y",)}
