"""Datasets of every supported kind open with the right columns, classes and splits, or are refused."""

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from hf_prune.data import source as source_module
from hf_prune.data.images import load_images
from hf_prune.errors import DataError

ALTERNATING = [0, 1] * 10


def image_bytes(rows):
    return [row["image"]["bytes"] for row in rows]


def test_digits_are_the_default():
    splits = load_images()
    assert (splits.source, splits.num_labels, splits.notes) == ("digits", 10, ())
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [1257, 180, 360]


def test_digits_can_be_streamed():
    streamed, counted = load_images(streaming=True), load_images()
    assert isinstance(streamed.train, datasets.IterableDataset)
    assert image_bytes(streamed.validation) == image_bytes(counted.validation)


def test_split_folders_with_class_folders(messy_folder, load):
    splits = load(messy_folder)
    assert splits.label_names == ("cat", "dog")
    assert (splits.image_column, splits.label_column) == ("image", "label")
    assert len(splits.train) + len(splits.validation) == 16
    assert splits.test["label"][:] == [0, 0, 0, 1, 1, 1]
    assert splits.notes == ("no validation split: 15% of train is held out for it",)


def test_class_folders_alone_are_all_train(messy_folder, load):
    splits = load(messy_folder / "train", train_val_split=0.25)
    assert len(splits.train) == 12
    assert splits.test is splits.validation
    assert splits.notes[1] == "no test split: the validation split stands in for it"


def test_opening_decodes_nothing(messy_folder, load, monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(PIL.Image, "open", fail)
    splits = load(messy_folder)
    assert set(splits.train[0]["image"]) == {"bytes", "path"}
    next(iter(load(messy_folder, streaming=True).train))


def test_folder_of_parquet_files_with_a_configuration(make_rows, write_parquet, load):
    folder = write_parquet(
        {"train": make_rows(ALTERNATING), "validation": make_rows([0, 1]), "test": make_rows([1, 1, 0])}
    )
    for config_name in (None, "plain"):
        splits = load(folder, config_name=config_name)
        assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [20, 2, 3]
        assert splits.label_names == ("cat", "dog")
        assert splits.notes == ()
    with pytest.raises(DataError, match=r"could not be opened.*fancy"):
        load(folder, config_name="fancy")


@pytest.mark.parametrize("pattern", ["train-00000-of-00002.parquet", "train-*.parquet"])
def test_parquet_file_or_glob_is_all_train(make_rows, write_parquet, load, pattern):
    folder = write_parquet({"train": [make_rows(ALTERNATING), make_rows(ALTERNATING, first_seed=50)]})
    splits = load(folder / pattern, train_val_split=0.1)
    num_files = 2 if "*" in pattern else 1
    assert (len(splits.train), len(splits.validation)) == (18 * num_files, 2 * num_files)


@pytest.mark.parametrize("name", ["val", "valid", "dev"])
def test_validation_goes_by_many_names(make_rows, write_parquet, load, name):
    splits = load(write_parquet({"train": make_rows(ALTERNATING), name: make_rows([1, 0, 1])}))
    assert splits.validation["label"][:] == [1, 0, 1]
    assert splits.test is splits.validation


def test_held_out_rows_are_apart_stratified_and_follow_the_seed(make_rows, write_parquet, load):
    rows = make_rows([0] * 30 + [1] * 10)
    folder = write_parquet({"train": rows})
    splits = load(folder, train_val_split=0.2)
    train, validation = image_bytes(splits.train), image_bytes(splits.validation)
    assert sorted(train + validation) == sorted(image_bytes(rows.cast_column("image", datasets.Image(decode=False))))
    assert np.bincount(splits.validation["label"][:]).tolist() == [6, 2]
    assert image_bytes(load(folder, train_val_split=0.2).validation) == validation
    assert image_bytes(load(folder, train_val_split=0.2, seed=1).validation) != validation


def test_a_class_with_one_image_can_be_held_out_from(make_rows, write_parquet, load):
    splits = load(write_parquet({"train": make_rows([0] * 9 + [1])}), train_val_split=0.3)
    assert (len(splits.train), len(splits.validation)) == (7, 3)


def test_limits_choose_from_all_classes(make_rows, write_parquet, load):
    sorted_by_class = [0] * 40 + [1] * 40
    folder = write_parquet({"train": make_rows(sorted_by_class), "test": make_rows(sorted_by_class)})
    splits = load(folder, max_train_samples=20, max_eval_samples=10)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [20, 10, 10]
    for split in (splits.train, splits.validation, splits.test):
        assert set(split["label"][:]) == {0, 1}
    assert image_bytes(splits.train) == image_bytes(load(folder, max_train_samples=20).train)
    assert len(load(folder, max_train_samples=10_000).train) == 68


def test_streamed_rows_are_the_counted_ones(make_rows, write_parquet, load):
    folder = write_parquet({"train": make_rows(ALTERNATING), "test": make_rows([1, 0])})
    streamed, counted = load(folder, streaming=True), load(folder)
    assert list(streamed.test) == list(counted.test)
    assert streamed.label_names == counted.label_names
    assert len(list(load(folder, streaming=True, max_eval_samples=1).test)) == 1


def test_streamed_folder(messy_folder, load):
    streamed = load(messy_folder, streaming=True)
    assert streamed.label_names == ("cat", "dog")
    assert len(list(streamed.train)) + len(list(streamed.validation)) == 16


def test_stream_is_held_out_by_content(make_rows, write_parquet, load):
    rows = make_rows([0] * 100 + [1] * 100)
    folder = write_parquet({"train": [rows, rows.select(range(50))]})
    splits = load(folder, streaming=True)
    train, validation = image_bytes(splits.train), image_bytes(splits.validation)
    assert len(train) + len(validation) == 250
    # Repeated images, here 50 of them, fall on one side: none is trained on and validated with.
    assert not set(train) & set(validation)
    assert 0.08 < len(validation) / 250 < 0.24
    assert {row["label"] for row in splits.validation} == {0, 1}
    assert image_bytes(load(folder, streaming=True).validation) == validation
    assert image_bytes(load(folder, streaming=True, seed=1).validation) != validation


def test_columns_are_found_by_type(make_rows, write_parquet, load):
    rows = make_rows(ALTERNATING).rename_columns({"image": "photo", "label": "species"})
    splits = load(write_parquet({"train": rows.add_column("width", [1] * 20)}))
    assert (splits.image_column, splits.label_column) == ("photo", "species")
    assert set(splits.train.column_names) == {"photo", "species"}


def test_one_of_several_columns_must_be_named(make_rows, write_parquet, load):
    rows = make_rows(ALTERNATING)
    twice = Dataset.from_dict(
        {"image": rows["image"][:], "thumb": rows["image"][:], "fine": ALTERNATING, "coarse": [0] * 20},
        features=Features(
            {
                "image": datasets.Image(),
                "thumb": datasets.Image(),
                "fine": ClassLabel(names=["a", "b"]),
                "coarse": ClassLabel(names=["c"]),
            }
        ),
    )
    folder = write_parquet({"train": twice})
    with pytest.raises(DataError, match=r"`image_column`.*\['image', 'thumb'\].*'coarse' \(ClassLabel\); pass"):
        load(folder)
    with pytest.raises(DataError, match=r"`label_column`.*\['fine', 'coarse'\]"):
        load(folder, image_column="thumb")
    assert load(folder, image_column="thumb", label_column="fine").label_names == ("a", "b")
    with pytest.raises(DataError, match=r"'thumbs' of .* must qualify"):
        load(folder, image_column="thumbs", label_column="fine")
    with pytest.raises(DataError, match=r"'thumb' of .* must qualify"):
        load(folder, image_column="image", label_column="thumb")


def test_images_without_their_type_can_be_named(make_rows, write_parquet, load, encode, make_picture):
    features = Features({"file": Value("binary"), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict(
        {"file": [encode(make_picture(row)) for row in range(20)], "label": ALTERNATING}, features=features
    )
    folder = write_parquet({"train": rows, "validation": rows})
    for streaming in (False, True):
        splits = load(folder, image_column="file", streaming=streaming)
        assert next(iter(splits.validation))["file"]["bytes"] == encode(make_picture(0))


def test_bare_integers_are_named_by_number(make_rows, write_parquet, load, integers):
    rows = make_rows([0, 1, 2, 4] * 5, label_type=integers)
    folder = write_parquet({"train": rows})
    assert load(folder).label_names == ("0", "1", "2", "3", "4")
    with pytest.raises(DataError, match="streamed dataset must name its classes"):
        load(folder, streaming=True)


@pytest.mark.parametrize("label_type", [Value("string"), Sequence(ClassLabel(names=["a"]))])
def test_labels_of_other_types_are_refused(make_rows, write_parquet, load, label_type):
    labels = ["a"] * 4 if label_type == Value("string") else [["a"]] * 4
    with pytest.raises(DataError, match="`label_column` must be a column of class labels or integers"):
        load(write_parquet({"train": make_rows(labels, label_type=label_type)}))


def test_folder_without_labels_is_refused(tmp_path, make_picture, load):
    make_picture(0).save(tmp_path / "0.png")
    make_picture(1).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"`label_column`.*got none"):
        load(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_stands_in_for_an_unlabelled_test_split(make_rows, write_parquet, load, streaming):
    folder = write_parquet(
        {"train": make_rows(ALTERNATING), "validation": make_rows([0, 1]), "test": make_rows([-1, -1])}
    )
    splits = load(folder, streaming=streaming)
    assert splits.test is splits.validation
    assert "is not labelled and is left out" in splits.notes[0]
    assert "the validation split stands in for it" in splits.notes[1]


def test_unlabelled_training_images_are_refused(make_rows, write_parquet, load):
    with pytest.raises(DataError, match="training images must be labelled"):
        load(write_parquet({"train": make_rows([-1] * 4)}))
    with pytest.raises(DataError, match=r"got -1 in row 2 of the train split .*\(2 such rows"):
        load(write_parquet({"train": make_rows([0, 1, -1, None])}, name="partly"))


def test_negative_integers_are_refused(make_rows, write_parquet, load, integers):
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.1, got -3 in row 1"):
        load(write_parquet({"train": make_rows([0, -3, 1], label_type=integers)}))


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_split_is_refused(make_rows, write_parquet, load, streaming):
    folder = write_parquet({"train": make_rows(ALTERNATING), "test": make_rows([])})
    with pytest.raises(DataError, match=r"at least one image, got none in the test split|corresponds to no data"):
        load(folder, streaming=streaming)


def test_one_image_cannot_be_divided(make_rows, write_parquet, load):
    with pytest.raises(DataError, match="at least 2, got 1"):
        load(write_parquet({"train": make_rows([0])}))
    with pytest.raises(DataError, match="at least one image, got none for"):
        load(write_parquet({"train": make_rows([0])}, name="streamed"), streaming=True)


def test_a_train_split_is_needed(make_rows, write_parquet, load):
    with pytest.raises(DataError, match=r"called 'train', got \['test'\]"):
        load(write_parquet({"test": make_rows(ALTERNATING)}))


def test_missing_or_broken_sources_say_so(tmp_path, load, monkeypatch):
    with pytest.raises(DataError, match="could not be opened: FileNotFoundError") as caught:
        load(tmp_path / "nowhere")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    (tmp_path / "broken.parquet").write_text("no parquet here")
    with pytest.raises(DataError, match="could not be opened: ArrowInvalid"):
        load(tmp_path / "broken.parquet")

    def no_such_dataset(*_args, **_kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no such dataset on the Hub")

    monkeypatch.setattr(source_module, "load_dataset", no_such_dataset)
    with pytest.raises(DataError, match=r"'nobody/nothing' which could not be opened.*no such dataset"):
        load("nobody/nothing")


def test_a_hub_id_is_passed_on_with_its_settings(make_rows, tmp_path, monkeypatch):
    asked = {}

    def fake_load_dataset(*args, **kwargs):
        asked.update(args=args, **kwargs)
        return DatasetDict(train=make_rows(ALTERNATING))

    monkeypatch.setattr(source_module, "load_dataset", fake_load_dataset)
    splits = load_images("some/pets", config_name="full", cache_dir=tmp_path)
    assert asked == {"args": ("some/pets", "full"), "streaming": False, "cache_dir": str(tmp_path)}
    assert splits.source == "some/pets"


@pytest.mark.parametrize(
    "settings",
    [
        {"train_val_split": 0.0},
        {"train_val_split": 1.0},
        {"max_train_samples": 0},
        {"max_eval_samples": -1},
        {"seed": -1},
    ],
)
def test_settings_are_checked_before_anything_is_opened(settings, monkeypatch):
    monkeypatch.setattr(source_module, "load_digits_dataset", lambda: pytest.fail("opened"))
    with pytest.raises(DataError, match="must"):
        load_images("digits", **settings)
