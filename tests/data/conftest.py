"""Small image datasets on disk, with the broken files that real ones have."""

import io

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from hf_prune.data.images import ImageSplits, load_images
from hf_prune.data.loader import make_loader
from hf_prune.data.transforms import Preprocessing, train_transform

CLASS_NAMES = ["cat", "dog"]


@pytest.fixture
def make_picture():
    """A picture that no other seed gives: smooth enough to survive JPEG, different in every corner."""

    def make(seed, size_px=(24, 20)):
        coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize(size_px, Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def encode():
    def encode(image, file_format="PNG"):
        buffer = io.BytesIO()
        image.save(buffer, file_format)
        return buffer.getvalue()

    return encode


@pytest.fixture
def load(tmp_path_factory):
    """`load_images` with a cache of its own."""
    cache_dir = tmp_path_factory.mktemp("cache")
    return lambda source, **settings: load_images(source, **{"cache_dir": cache_dir} | settings)


@pytest.fixture
def messy_folder(tmp_path, make_picture, encode):
    """An image folder of 2 x 8 training files, of which 2 are broken, and 2 x 3 test files, 1 broken.

    In order of rows: train 2 is cut short, train 11 is text; test 1 is cut short.
    """
    for split, per_class in {"train": 8, "test": 3}.items():
        for label, name in enumerate(CLASS_NAMES):
            folder = tmp_path / "messy" / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                picture = make_picture(1000 * (split == "test") + 100 * label + number, (40, 30))
                picture.save(folder / f"{number}.jpg", "JPEG")
    train, test = tmp_path / "messy/train", tmp_path / "messy/test"
    for path in (train / "cat/2.jpg", test / "cat/1.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    (train / "dog/3.jpg").write_text("not an image")
    for path, mode, file_format in (
        (train / "cat/5.jpg", "P", "PNG"),
        (train / "dog/5.jpg", "CMYK", "JPEG"),
        (train / "dog/6.jpg", "L", "PNG"),
        (train / "dog/7.jpg", "RGBA", "PNG"),
    ):
        path.write_bytes(encode(Image.open(path).convert(mode), file_format))
    return tmp_path / "messy"


@pytest.fixture
def make_rows(make_picture, encode):
    """Rows with the columns "image" and "label", sorted by class as image folders are."""

    def make(labels, *, label_type=None, first_seed=0):
        features = Features({"image": datasets.Image(), "label": label_type or ClassLabel(names=CLASS_NAMES)})
        images = [{"bytes": encode(make_picture(first_seed + row)), "path": None} for row in range(len(labels))]
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    return make


@pytest.fixture
def write_parquet(tmp_path):
    """Writes split name -> rows (or a list, one file each) as parquet, with a README that names them."""

    def write(splits, name="parquet"):
        folder = tmp_path / name
        folder.mkdir()
        lines = ["---", "configs:", "- config_name: plain", "  data_files:"]
        for split, files in splits.items():
            files = files if isinstance(files, list) else [files]
            for number, rows in enumerate(files):
                rows.to_parquet(folder / f"{split}-{number:05d}-of-{len(files):05d}.parquet")
            lines += [f"  - split: {split}", f"    path: {split}-*.parquet"]
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
        return folder

    return write


@pytest.fixture
def integers():
    return Value("int64")


@pytest.fixture
def plain():
    """Small and unnormalised, so that pixels can be compared by eye."""
    return Preprocessing(size_px=(16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def splits_of():
    """Splits around rows that need no folder."""

    def wrap(rows, num_labels=2):
        rows = rows.cast_column("image", datasets.Image(decode=False))
        names = tuple(str(number) for number in range(num_labels))
        return ImageSplits(
            train=rows,
            validation=rows,
            test=rows,
            label_names=names,
            image_column="image",
            label_column="label",
            source="rows",
        )

    return wrap


@pytest.fixture
def numbered(make_rows, splits_of, integers):
    """24 readable rows; the label of a row is its index, so that batches tell which rows they hold."""
    return splits_of(make_rows(list(range(24)), label_type=integers), num_labels=24)


@pytest.fixture
def numbered_stream(numbered, splits_of):
    """The same rows as a stream of several files."""

    def make(num_files=4):
        return splits_of(numbered.train.to_iterable_dataset(num_shards=num_files), num_labels=24)

    return make


@pytest.fixture
def train_loader(plain):
    def make(splits, **settings):
        defaults = {"transform": train_transform(plain), "batch_size": 4, "train": True, "seed": 3}
        return make_loader(splits.train, splits=splits, **defaults | settings)

    return make
