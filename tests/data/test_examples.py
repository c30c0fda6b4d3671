"""Broken images and labels: counted, left out or refused, never a crash in the middle of an epoch."""

import io

import datasets
import pytest
import torch

from hf_prune.data import examples as examples_module
from hf_prune.data.decode import decode_image
from hf_prune.data.examples import IGNORED_LABEL, ImageExamples
from hf_prune.data.loader import make_loader
from hf_prune.data.transforms import eval_transform
from hf_prune.errors import DataError


def batches_of(loader):
    return [{name: tensor.clone() for name, tensor in batch.items()} for batch in loader]


def labels_of(batches):
    return torch.cat([batch["labels"] for batch in batches]).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_and_counts_unreadable_images(messy_folder, tmp_path, splits_of, plain, num_workers):
    rows = datasets.load_dataset(str(messy_folder), split="train", cache_dir=str(tmp_path / "cache"))
    splits = splits_of(rows)
    loader = make_loader(
        splits.train,
        splits=splits,
        transform=eval_transform(plain),
        batch_size=4,
        train=True,
        num_workers=num_workers,
    )
    batches = batches_of(loader)
    assert sum(len(batch["labels"]) for batch in batches) == 16
    assert sum(int(batch["unreadable"].sum()) for batch in batches) == 2
    assert all(0 <= label < 2 for label in labels_of(batches))
    assert all(pixels.std() > 0 for batch in batches for pixels in batch["pixel_values"])

    examples = loader.dataset
    assert [row for row in range(16) if examples[row]["unreadable"]] == [2, 11]
    for row in (2, 11):
        assert torch.equal(examples[row]["pixel_values"], examples[row + 1]["pixel_values"])
        assert examples[row]["labels"] == examples[row + 1]["labels"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_counts_unreadable_images_and_leaves_them_out(messy_folder, load, plain, num_workers):
    splits = load(messy_folder)
    loader = make_loader(
        splits.test,
        splits=splits,
        transform=eval_transform(plain),
        batch_size=4,
        train=False,
        num_workers=num_workers,
    )
    batches = batches_of(loader)
    assert labels_of(batches) == [0, IGNORED_LABEL, 0, 1, 1, 1]
    assert torch.cat([batch["unreadable"] for batch in batches]).tolist() == [0, 1, 0, 0, 0, 0]
    assert batches[0]["pixel_values"][1].abs().max() == 0
    assert batches[0]["pixel_values"][0].std() > 0


def broken_images(encode, picture):
    good, oversized = encode(picture), bytearray(encode(picture))
    oversized[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the PNG header
    return {
        "null": None,
        "no bytes": {"bytes": None, "path": None},
        "empty": {"bytes": b"", "path": None},
        "text": {"bytes": b"hello", "path": None},
        "missing file": {"bytes": None, "path": "/no/such/image.png"},
        "truncated": {"bytes": good[: len(good) // 2], "path": None},
        "broken chunk": {"bytes": good.replace(b"IDAT", b"I\x00AT"), "path": None},
        "bomb": {"bytes": bytes(oversized), "path": None},
    }


@pytest.mark.parametrize("kind", broken_images(lambda _: b"", None))
def test_every_kind_of_breakage_is_survived(kind, make_rows, splits_of, encode, make_picture, plain):
    broken = broken_images(encode, make_picture(0))[kind]
    good = {"bytes": encode(make_picture(1)), "path": None}
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": struct, "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [good, broken], "label": [0, 1]}, features=features)
    splits = splits_of(rows)
    for train, expected in ((True, (0, 1)), (False, (IGNORED_LABEL, 1))):
        examples = ImageExamples(splits.train, splits=splits, transform=eval_transform(plain), train=train)
        assert (examples[0]["labels"], examples[0]["unreadable"]) == (0, 0)
        assert (examples[1]["labels"], examples[1]["unreadable"]) == expected  # wraps to row 0 in training


def test_images_from_a_phone_are_turned_upright(make_picture):
    image = make_picture(0, (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode_image({"bytes": buffer.getvalue(), "path": None}).size == (20, 40)


@pytest.mark.parametrize("train", [True, False])
def test_a_long_run_of_unreadable_images_is_an_error(splits_of, plain, train, monkeypatch):
    monkeypatch.setattr(examples_module, "MAX_UNREADABLE_RUN", 6)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    broken = {"bytes": b"broken", "path": None}
    rows = datasets.Dataset.from_dict({"image": [broken] * 9, "label": [0] * 9}, features=features)
    for split in (rows, rows.to_iterable_dataset()):
        splits = splits_of(split, num_labels=1)
        loader = make_loader(splits.train, splits=splits, transform=eval_transform(plain), batch_size=1, train=train)
        with pytest.raises(DataError, match="no more than 6 images in a row may be unreadable") as caught:
            list(loader)
        assert isinstance(caught.value.__cause__, OSError)


def test_all_images_unreadable_is_an_error_however_few(splits_of, plain):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = datasets.Dataset.from_dict({"image": [None] * 3, "label": [0] * 3}, features=features)
    splits = splits_of(rows, num_labels=1)
    examples = ImageExamples(splits.train, splits=splits, transform=eval_transform(plain), train=True)
    with pytest.raises(DataError, match="unreadable, got 3"):
        examples[1]


@pytest.mark.parametrize("train", [True, False])
def test_labels_out_of_range_name_their_row(make_rows, splits_of, integers, plain, train):
    for bad in (-1, 2):
        rows = make_rows([0, 1, bad], label_type=integers)
        for split in (rows, rows.to_iterable_dataset()):
            splits = splits_of(split)
            loader = make_loader(splits.test, splits=splits, transform=eval_transform(plain), batch_size=1, train=train)
            with pytest.raises(DataError, match=rf"must lie in 0\.\.1, got {bad} in row \d of 'rows'"):
                list(loader)
