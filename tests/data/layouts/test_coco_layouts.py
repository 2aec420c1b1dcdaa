"""COCO's captions in one file and in a file for each split, and Karpathy's JSON."""

import pytest
from small_folder import captions, coco, examples, write, write_images

from flaxcap.data.base import DataError

THREE = ["p0.jpg", "p1.jpg", "p2.jpg"]


def test_splits_of_the_images_are_used(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, *(f"train2014/{name}" for name in THREE))
    tree = coco([f"train2014/{name}" for name in THREE])
    for image, split in zip(tree["images"], ("Train", "validation", "TEST"), strict=True):
        image["split"] = split
    write(folder / "captions.json", tree)
    assert {split: [*found] for split, found in captions(folder).items()} == {
        "train": ["train2014/p0.jpg"],
        "val": ["train2014/p1.jpg"],
        "test": ["train2014/p2.jpg"],
    }
    del tree["images"][1]["split"]
    write(folder / "captions.json", tree)
    with pytest.raises(DataError, match=r"captions\.json, images\[1\], field 'split': found null, expected a split in"):
        captions(folder)


@pytest.mark.parametrize(
    ("train", "val", "folders"),
    [
        ("annotations/captions_train2014.json", "annotations/captions_val2014.json", ("train2014", "val2014")),
        ("captions_train2017.json", "captions_val2017.json", ("images/train2017", "images/val2017")),
        ("train.json", "valid.json", ("train", "valid")),
        ("Train_captions.json", "Dev_captions.json", ("images/train", "images/val")),
        ("train/captions.json", "validation/captions.json", ("train", "validation")),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", ("train", "valid")),
    ],
)
def test_a_file_for_each_split(tmp_path, train, val, folders):
    folder = tmp_path / "in"
    # Both splits have images of the same names and ids.
    for place, names in zip(folders, (["1.jpg", "2.jpg"], ["1.jpg"]), strict=True):
        write_images(folder, *(f"{place}/{name}" for name in names))
    write(folder / train, coco(["1.jpg", "2.jpg"]))
    write(folder / val, coco(["1.jpg"]))
    for other in ("annotations/instances_train2014.json", "annotations/instances_val2014.json"):
        write(folder / other, "{}")
    found = examples(folder)
    assert {split: [(e.image_id, e.filename) for e in some] for split, some in found.items()} == {
        "train": [(1, f"{folders[0]}/1.jpg"), (2, f"{folders[0]}/2.jpg")],
        "val": [(1, f"{folders[1]}/1.jpg")],
    }
    for some in found.values():
        for example in some:
            assert example.image == (folder / example.filename).read_bytes()


def test_one_file_that_names_a_split_is_split_by_a_hash(tmp_path):
    folder = tmp_path / "in"
    names = [f"{number}.jpg" for number in range(40)]
    write_images(folder, *names)
    write(folder / "captions_train2014.json", coco(names))
    found = captions(folder)
    assert {"train", "val"} <= set(found)
    assert sorted(name for some in found.values() for name in some) == sorted(names)


def test_files_of_two_years_are_refused(tmp_path):
    folder = tmp_path / "in"
    for year in (2014, 2017):
        for split in ("train", "val"):
            write(folder / "annotations" / f"captions_{split}{year}.json", coco(["1.jpg"]))
    with pytest.raises(DataError, match=r"found 2 layouts: .*captions_train2014\.json, .*captions_train2017\.json"):
        captions(folder)


def karpathy(**more) -> dict:
    splits = ["train", "restval", "val", "test"]
    return {
        "dataset": "any",
        "images": [
            {
                "filename": f"{number}.jpg",
                "imgid": 10 + number,
                "split": split,
                "sentids": [number],
                "sentences": [{"raw": f"A thing {number} .", "tokens": ["a"], "imgid": number, "sentid": number}],
                **more,
            }
            for number, split in enumerate(splits)
        ],
    }


@pytest.mark.parametrize("name", ["dataset_flickr8k.json", "dataset_flickr30k.json", "dataset.json", "mine.json"])
@pytest.mark.parametrize("place", ["", "Images/", "flickr30k_images/"])
def test_karpathys_json(tmp_path, name, place):
    folder = tmp_path / "in"
    write_images(folder, *(f"{place}{number}.jpg" for number in range(4)))
    write(folder / name, karpathy())
    found = examples(folder)
    assert {split: [(e.image_id, e.filename, e.captions) for e in some] for split, some in found.items()} == {
        split: [(10 + number, f"{number}.jpg", (f"A thing {number} .",))]
        for number, split in enumerate(["train", "restval", "val", "test"])
    }


def test_karpathys_json_of_coco_names_the_folders(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, *(f"val2014/{number}.jpg" for number in range(4)))
    tree = karpathy(filepath="val2014")
    for image in tree["images"]:
        image["cocoid"] = image["imgid"] + 500
    tree["images"].append(tree["images"][0])
    write(folder / "dataset_coco.json", tree)
    found = examples(folder)
    assert [(e.image_id, e.filename, e.captions) for e in found["train"]] == [
        (510, "val2014/0.jpg", ("A thing 0 .",)),
    ], "the repeated record is dropped"
    tree["images"][0]["filepath"] = "../elsewhere"
    write(folder / "dataset_coco.json", tree)
    with pytest.raises(DataError, match=r"images\[0\], field 'filename': found '\.\./elsewhere', expected a path"):
        captions(folder)
    tree["images"][0] |= {"filepath": "val2014", "sentences": [{"tokens": []}]}
    write(folder / "dataset_coco.json", tree)
    with pytest.raises(DataError, match=r"images\[0\], sentences\[0\], field 'raw': found none"):
        captions(folder)


def test_flickr8k_reads_karpathys_and_kaggles_files(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, *(f"Images/{number}.jpg" for number in range(4)))
    write(folder / "dataset_flickr8k.json", karpathy())
    write(folder / "dataset_flickr30k.json", karpathy())
    assert captions(folder, "flickr8k")["test"] == {"3.jpg": ("A thing 3 .",)}
    with pytest.raises(DataError, match=r"2 layouts: .*dataset_flickr8k\.json.*dataset_flickr30k\.json"):
        captions(folder)
    kaggle = tmp_path / "kaggle"
    write_images(kaggle, "Images/0.jpg", "Images/1.jpg")
    write(kaggle / "captions.txt", 'image,caption\n0.jpg,A dog , and "more" .\n1.jpg,"A ""cat"" , too ."\n')
    assert captions(kaggle, "flickr8k") == captions(kaggle)
