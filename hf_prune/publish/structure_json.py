"""A model's structure as JSON and back, checked as data from strangers against the dense skeleton it is for.

Tensors go by their names in the checkpoint file. Modules have none there, so each is addressed from a tensor nearby:
`{"near": "encoder.layer.0.query.weight", "up": 1, "down": ""}` is what holds the layer that holds this weight.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_prune.analyse.running import named_tensors
from hf_prune.errors import ManifestError
from hf_prune.surgery.structure import Removed, Shape, Structure, structure_of

PARTS = {"tensors", "attributes", "calls", "removed", "features", "parts", "factors"}
LARGEST = 2**31 - 1


def to_json(model: nn.Module, disk_names: Mapping[str, str]) -> dict[str, Any]:
    """Return the structure of a model.

    Args:
        model: Pruned.
        disk_names: Name of a tensor now -> its name in the checkpoint file.
    """
    structure = structure_of(model)
    gone = {path: removed.tensor for path, removed in structure.removed.items()}
    names = [name for name in named_tensors(model) if not any(name.startswith(f"{path}.") for path in gone)]

    def address(path: str) -> dict[str, Any]:
        return {"near": disk_names[gone[path]], **_steps(gone[path], path)} if path in gone else _near(path)

    def _near(path: str) -> dict[str, Any]:
        inside = path
        while not (held := [name for name in names if not inside or name.startswith(f"{inside}.")]):
            inside = inside.rpartition(".")[0]
        return {"near": disk_names[held[0]], **_steps(held[0], path)}

    return {
        "tensors": {disk_names[name]: list(shape) for name, shape in structure.shapes.items()},
        "attributes": [{**address(path), "set": dict(values)} for path, values in structure.attributes.items()],
        "calls": [{**address(path), "numbers": _text_keys(row)} for path, row in structure.calls.items()],
        "removed": [
            {**address(path), "constant": None if removed.constant is None else dict(removed.constant)}
            for path, removed in structure.removed.items()
        ],
        "features": None if structure.features is None else list(structure.features),
        "factors": {disk_names[name]: list(sizes) for name, sizes in structure.factors.items()},
        "parts": sorted({part_of(disk_names[name]) for name in named_tensors(model)}),
    }


def part_of(name: str) -> str:
    """Return the part of a model that a tensor is in: `vit.pooler`."""
    return ".".join(name.split(".")[:2])


def _steps(tensor: str, path: str) -> dict[str, Any]:
    """Return the way from the module that holds a tensor to another one: first up, then down."""
    owner, goal = tensor.split(".")[:-1], path.split(".") if path else []
    shared = 0
    while shared < min(len(owner), len(goal)) and owner[shared] == goal[shared]:
        shared += 1
    return {"up": len(owner) - shared, "down": ".".join(goal[shared:])}


def _text_keys(row: Mapping[int, Mapping[int, int | float]]) -> dict[str, dict[str, int | float]]:
    return {str(call): {str(position): value for position, value in numbers.items()} for call, numbers in row.items()}


def from_json(data: Any, model: nn.Module, names: Mapping[str, str], *, whole: bool, layout: bool = True) -> Structure:
    """Return the structure that a manifest describes, after checking that it can be given to a dense model.

    Args:
        data: What `to_json` returned, or anything.
        model: Dense skeleton; not changed.
        names: Name of a tensor in the checkpoint file -> its name now.
        whole: Whether the manifest was made for this class; a model without its head may lack some of the tensors.
        layout: Whether modules are laid out as they were; if not, nothing is said of attributes and calls.

    Raises:
        ManifestError: If the data is malformed, or does not fit.
    """
    _require(isinstance(data, Mapping) and set(data) == PARTS, f"`structure` must hold exactly {sorted(PARTS)}", data)
    right = isinstance(data["parts"], list) and all(isinstance(part, str) for part in data["parts"])
    _require(right, "`parts` must be a list of names", data["parts"])
    reader = _Reader(model, names, whole)
    removed = {
        path: _removed(entry, near, reader) for path, near, entry in reader.at_modules(data["removed"], "constant")
    }
    shapes, factors = reader.shapes(data["tensors"]), reader.factors(data["factors"])
    if not layout:
        return Structure(shapes, removed=removed, factors=factors, features=_features(data["features"]))
    attributes = {
        path: _attributes(entry["set"], path, reader) for path, _, entry in reader.at_modules(data["attributes"], "set")
    }
    calls = {path: _calls(entry["numbers"], path) for path, _, entry in reader.at_modules(data["calls"], "numbers")}
    for path in (*attributes, *calls, *removed):
        inside = [outer for outer in removed if path.startswith(f"{outer}.") or (path == outer and path not in removed)]
        _require(not inside, f"'{path}' must not be changed and removed, too", inside)
    return Structure(shapes, attributes, calls, removed, factors, _features(data["features"]))


class _Reader:
    """Finds the tensors and modules of a dense skeleton by their addresses."""

    def __init__(self, model: nn.Module, names: Mapping[str, str], whole: bool) -> None:
        self.names, self.whole = names, whole
        self.modules, self.tensors = dict(model.named_modules()), named_tensors(model)

    def shapes(self, data: Any) -> dict[str, Shape]:
        """Return the shapes of tensors by their names now."""
        _require(isinstance(data, Mapping), "`tensors` must map names to shapes", data)
        found = {}
        for name, shape in data.items():
            _require(isinstance(shape, list) and len(shape) <= 8, f"the shape of '{name}' must be a list", shape)
            tensor = self.tensors.get(self.names.get(name, ""))
            if tensor is None:
                _require(not self.whole, "the model must have the tensor", name)
                continue
            fits = len(shape) == tensor.ndim and all(
                n is None or (type(n) is int and 1 <= n <= m) for n, m in zip(shape, tensor.shape, strict=True)
            )
            _require(
                fits, f"'{name}' must have lengths from 1 to {tuple(tensor.shape)}, null where it was not cut", shape
            )
            found[self.names[name]] = tuple(shape)
        return found

    def factors(self, data: Any) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        """Return what dimensions are made of, by the names of tensors now."""
        _require(isinstance(data, Mapping), "`factors` must map names to sizes", data)
        found = {}
        for name, dims in data.items():
            right = isinstance(dims, list) and all(n is None or (_are_ints(n) and len(n) <= 64) for n in dims)
            _require(right and len(dims) <= 8, f"`factors` of '{name}' must be lists of sizes, or null", dims)
            if name in self.names:
                found[self.names[name]] = tuple(None if sizes is None else tuple(sizes) for sizes in dims)
        return found

    def at_modules(self, data: Any, key: str) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
        """Yield the path of the module, the tensor near it, and the entry."""
        _require(isinstance(data, list), f"entries with `{key}` must be in a list", data)
        for entry in data:
            wanted = {"near", "up", "down", key}
            _require(isinstance(entry, Mapping) and set(entry) == wanted, f"must hold exactly {sorted(wanted)}", entry)
            near, up, down = entry["near"], entry["up"], entry["down"]
            right = isinstance(near, str) and type(up) is int and isinstance(down, str)
            _require(right and re.fullmatch(r"[\w.]*", down), "an address must be a name, a number and a path", entry)
            if near not in self.names:
                _require(not self.whole, "the model must have the tensor", near)
                continue
            owner = self.names[near].split(".")[:-1]
            if up > len(owner) and not self.whole:
                continue  # of a module around this part of the model
            _require(0 <= up <= len(owner), "`up` must not lead out of the model", entry)
            path = ".".join([*owner[: len(owner) - up], *filter(None, down.split("."))])
            _require(path in self.modules, "the model must have the module", path)
            yield path, self.names[near], entry


def _removed(entry: Mapping[str, Any], near: str, reader: _Reader) -> Removed:
    constant = entry["constant"]
    if constant is None:
        return Removed(None, near)
    keys = {"shape", "adds", "like", "num_returned"}
    _require(isinstance(constant, Mapping) and set(constant) == keys, f"must hold exactly {sorted(keys)}", constant)
    shape, like, returned = constant["shape"], constant["like"], constant["num_returned"]
    widest = max(max(tensor.shape, default=1) for tensor in reader.tensors.values())
    right = _are_ints(shape) and 1 <= len(shape) <= 6 and all(n >= 1 for n in shape) and math.prod(shape) <= widest
    _require(right, f"the shape of a constant must have from 1 to {widest} elements", shape)
    _require(_are_ints(like) and all(0 <= d < len(shape) for d in like), "`like` must name dimensions", like)
    _require(type(constant["adds"]) is bool, "`adds` must be true or false", constant["adds"])
    _require(type(returned) is int and 0 <= returned <= 16, "`num_returned` must be from 0 to 16", returned)
    return Removed(dict(constant), near)


def _attributes(values: Any, path: str, reader: _Reader) -> dict[str, Any]:
    _require(isinstance(values, Mapping), "`set` must map attributes to values", values)
    return {name: _attribute(vars(reader.modules[path]), path, name, value) for name, value in values.items()}


def _attribute(attributes: Mapping[str, Any], path: str, name: Any, value: Any) -> Any:
    old = attributes.get(name) if isinstance(name, str) and not name.startswith("_") else None
    if type(old) is int:
        _require(type(value) is int and 1 <= value <= old, f"'{name}' of '{path}' must be from 1 to {old}", value)
        return value
    if not isinstance(old, tuple | list) or not _are_ints(old):
        raise ManifestError(f"'{path}' must have sizes under that name, got {name!r:.120}")
    right = _are_ints(value) and len(value) == len(old)
    right = right and all(n == m or 1 <= n <= m for n, m in zip(value, old, strict=True))
    _require(right, f"'{name}' of '{path}' must be from 1 to {old}", value)
    return type(old)(value)


def _calls(numbers: Any, path: str) -> dict[int, dict[int, int | float]]:
    where = f"the calls of '{path}'"
    _require(isinstance(numbers, Mapping), f"{where} must be an object", numbers)
    found: dict[int, dict[int, int | float]] = {}
    for call, row in numbers.items():
        _require(re.fullmatch(r"\d{1,5}", str(call)) and isinstance(row, Mapping), f"{where} must have numbers", call)
        for position, value in row.items():
            right = re.fullmatch(r"\d{1,2}", str(position)) and type(value) in (int, float)
            right = right and 0 < abs(value) <= LARGEST
            _require(right and (type(value) is float or value > 0), f"{where} must be given sizes and scales", value)
            found.setdefault(int(call), {})[int(position)] = value
    return found


def _features(data: Any) -> tuple[int, ...] | None:
    right = data is None or (_are_ints(data) and all(1 <= n <= LARGEST for n in data))
    _require(right, "`features` must be a list of channels or null", data)
    return None if data is None else tuple(data)


def _are_ints(data: Any) -> bool:
    return isinstance(data, list | tuple) and all(type(n) is int for n in data)


def _require(condition: Any, message: str, came: Any) -> None:
    if not condition:
        raise ManifestError(f"{message}, got {came!r:.120}")
