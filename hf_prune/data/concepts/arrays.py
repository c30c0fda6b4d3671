"""Arrays in compressed `.npz` files that are written whole or not at all, and checked before they are believed."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hf_prune.errors import DataError

# dtype, and per dimension the least and the most; None is any size.
Form = tuple[type, tuple[tuple[int, int | None], ...]]
BROKEN = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray]) -> None:
    """Write arrays under another name first, and rename the file when it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(arrays))
        os.replace(partial, path)  # noqa: PTH105 (says what it does: one atomic step)
    finally:
        partial.unlink(missing_ok=True)


def read_arrays(path: Path, forms: Mapping[str, Form]) -> dict[str, npt.NDArray]:
    """Read arrays of known form. Nothing is unpickled, and no memory is taken for more than the form allows.

    Args:
        path: File written by `write_arrays`.
        forms: Name -> type and sizes of every array that must be there.

    Raises:
        DataError: If the file is missing, broken, or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {f"{name}.npy" for name in forms}
            if set(archive.namelist()) != names or len(archive.namelist()) != len(names):
                raise ValueError(f"it must hold {sorted(names)}, got {sorted(archive.namelist())}")
            return {name: _read(archive, name, form) for name, form in forms.items()}
    except BROKEN as err:
        raise DataError(
            f"'{path}' must be a file of concepts, but: {type(err).__name__}: {err}; delete it to have it made again"
        ) from err


def _read(archive: zipfile.ZipFile, name: str, form: Form) -> npt.NDArray:
    with archive.open(f"{name}.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"`{name}` must be an array of format 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    kind, sizes = form
    fits = len(shape) == len(sizes) and all(
        low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, sizes, strict=True)
    )
    if dtype != np.dtype(kind) or not fits or int(np.prod(shape)) * dtype.itemsize > _stored(archive, name):
        raise ValueError(f"`{name}` must be {np.dtype(kind)} of sizes {sizes}, got {dtype} of {shape}")
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _stored(archive: zipfile.ZipFile, name: str) -> int:
    return archive.getinfo(f"{name}.npy").file_size
