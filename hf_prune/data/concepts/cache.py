"""A folder of concepts: one JSON and one array file per class, and what they were made with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_prune.data.concepts.arrays import read_arrays, write_arrays
from hf_prune.data.concepts.pictures import Pictures
from hf_prune.data.concepts.records import ClassConcepts
from hf_prune.data.concepts.settings import ConceptSettings
from hf_prune.data.concepts.storage import class_forms, class_from, to_arrays, to_json
from hf_prune.data.concepts.teacher import Teacher
from hf_prune.errors import DataError
from hf_prune.files import write_whole

FORMAT_VERSION = 1
HEADER, RANDOM = "concepts.json", "random.npz"
# What may differ between a cache and the run that goes on with it.
INFORMATIVE = ("source",)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What concepts were made with.

    Attributes:
        teacher: Fingerprint of the weights.
        layer: Whose features were taken.
        size_px: Height and width of the pictures.
        mean: Of the teacher's normalisation.
        std: Of the teacher's normalisation.
        crop: How pictures were cut out of images: filter, share and way.
        label_names: Classes of the dataset.
        labels: Fingerprint of the labels of all rows.
        settings: All numbers.
        source: Where the dataset came from; may differ.
    """

    teacher: str
    layer: str
    size_px: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: tuple[str, float, str]
    label_names: tuple[str, ...]
    labels: str
    settings: ConceptSettings
    source: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, teacher: Teacher, pictures: Pictures, settings: ConceptSettings, source: str) -> "Header":
        """Describe a run."""
        like = teacher.preprocessing
        return cls(
            teacher=teacher.digest(),
            layer=teacher.layer,
            size_px=like.size_px,
            # Those of an image processor are measured, not read.
            mean=tuple(round(value, 4) for value in like.mean),
            std=tuple(round(value, 4) for value in like.std),
            crop=(like.interpolation, like.crop_pct, like.crop_mode),
            label_names=pictures.label_names,
            labels=hashlib.blake2b(pictures.labels.astype("<i8").tobytes(), digest_size=16).hexdigest(),
            settings=settings,
            source=source,
        )

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Read a header.

        Raises:
            DataError: If there is none, or it is not one.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or set(data) != {field.name for field in fields(cls)}:
                raise ValueError("it must hold the fields of a header and no others")
            if data["format_version"] != FORMAT_VERSION:
                raise ValueError(f"`format_version` must be {FORMAT_VERSION}, got {data['format_version']!r}")
            height, width = data["size_px"]
            names = data["label_names"]
            if not all(type(side) is int and 0 < side < 1 << 16 for side in (height, width)):
                raise ValueError(f"`size_px` must hold two sides, got {data['size_px']}")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("`label_names` must be names")
            tuples = {key: tuple(data[key]) for key in ("size_px", "mean", "std", "crop", "label_names")}
            return cls(**{**data, **tuples, "settings": _settings(data["settings"])})
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as err:
            raise DataError(
                f"'{path}' must say what the concepts beside it were made with, but: {err}; find them again with "
                f"`discover_concepts`, in an empty folder"
            ) from err

    def differences(self, other: "Header") -> list[str]:
        """Name what is not the same in another header, with both values."""
        mine, theirs = ({**asdict(h), **asdict(h.settings)} for h in (self, other))
        # Concepts are kept whether significant or not.
        names = [name for name in mine if name not in (*INFORMATIVE, "settings", "max_p_value")]
        return [
            f"{name}: {_short(theirs[name])}, not {_short(mine[name])}" for name in names if mine[name] != theirs[name]
        ]


class ConceptCache:
    """Concepts of the classes of a dataset, on disk; a class is read when it is asked for.

    Attributes:
        folder: Where.
        header: What they were made with.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header

    @classmethod
    def open(cls, folder: str | Path) -> "ConceptCache":
        """Open what `discover_concepts` made.

        Raises:
            DataError: If it did not make that folder.
        """
        return cls(Path(folder), Header.read(Path(folder) / HEADER))

    @classmethod
    def at(cls, folder: str | Path, header: Header) -> "ConceptCache":
        """Make a folder, or open one that was made with the same things.

        Raises:
            DataError: If it was made with others.
        """
        folder = Path(folder)
        if (folder / HEADER).exists():
            differences = header.differences(Header.read(folder / HEADER))
            if differences:
                raise DataError(
                    f"the concepts in '{folder}' must be made with the same teacher, data and settings as wanted now, "
                    f"but have {'; '.join(differences)}; take another folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / HEADER, json.dumps(asdict(header), indent=1) + "\n")
        return cls(folder, header)

    @property
    def labels(self) -> tuple[int, ...]:
        """Classes that are there, with concepts or without."""
        return tuple(label for label in range(len(self.header.label_names)) if self.has(label))

    def without_concepts(self) -> dict[int, str]:
        """Return classes that have no concepts, and why."""
        problems = {label: self._json(label)["problem"] for label in self.labels}
        return {label: str(problem) for label, problem in problems.items() if problem is not None}

    def has(self, label: int) -> bool:
        """Return whether a class was finished: its JSON is written last."""
        return self._path(label, ".json").exists()

    def read(self, label: int) -> ClassConcepts:
        """Read a class.

        Raises:
            DataError: If it is not there, or its files are broken.
        """
        if not self.has(label):
            raise DataError(f"class {label} must be in '{self.folder}', which holds {self.labels}; find its concepts")
        arrays = read_arrays(self._path(label, ".npz"), class_forms(self.header.settings, self.header.size_px))
        try:
            return class_from(label, self._json(label), arrays, self.header.settings)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as err:
            raise self._broken(label, err) from err

    def write(self, found: ClassConcepts) -> None:
        """Keep a class; its files appear whole or not at all."""
        write_arrays(self._path(found.label, ".npz"), to_arrays(found))
        write_whole(self._path(found.label, ".json"), json.dumps(to_json(found), indent=1, allow_nan=False) + "\n")

    def random_features(self) -> npt.NDArray[np.float32] | None:
        """Return the features of random images, sets x images x features, if they were kept.

        Raises:
            DataError: If the file is broken.
        """
        path, settings = self.folder / RANDOM, self.header.settings
        if not path.exists():
            return None
        sets = settings.num_random_sets + 1
        form = (np.float32, ((sets, sets), (3, settings.random_images_used), (1, None)))
        features = read_arrays(path, {"features": form})["features"]
        if not np.isfinite(features).all():
            raise DataError(f"'{path}' must hold finite numbers; delete it to have it made again")
        return features

    def write_random_features(self, features: npt.NDArray[np.float32]) -> None:
        """Keep the features of random images."""
        write_arrays(self.folder / RANDOM, {"features": features})

    def _path(self, label: int, suffix: str) -> Path:
        return self.folder / f"class_{label:05d}{suffix}"

    def _json(self, label: int) -> Mapping[str, Any]:
        try:
            data = json.loads(self._path(label, ".json").read_text(encoding="utf-8"))
            if not isinstance(data, dict) or "problem" not in data:
                raise ValueError("it must hold the concepts of a class")
        except (OSError, ValueError, RecursionError) as err:
            raise self._broken(label, err) from err
        return data

    def _broken(self, label: int, err: Exception) -> DataError:
        return DataError(
            f"'{self._path(label, '.json')}' must hold the concepts of a class, but: {type(err).__name__}: {err}; "
            f"delete it to have it made again"
        )


def _settings(data: Mapping[str, Any]) -> ConceptSettings:
    names = {field.name: field.type for field in fields(ConceptSettings)}
    if not isinstance(data, dict) or set(data) != set(names):
        raise ValueError("`settings` must hold every number of concept discovery and no others")
    rules = tuple((float(a), float(b)) for a, b in data["keep_rules"])
    counts = tuple(int(count) for count in data["segment_counts"])
    plain = {name: value for name, value in data.items() if name not in ("keep_rules", "segment_counts")}
    default = asdict(ConceptSettings())
    for name, value in plain.items():
        allowed = (int, float) if isinstance(default[name], float) else type(default[name])
        if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default[name], bool)):
            raise ValueError(f"`{name}` must be a number like {default[name]!r}, got {value!r}")
    return ConceptSettings(**plain, keep_rules=rules, segment_counts=counts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
