"""Do something as soon as a module is imported, or at once if it is imported already.

So `import hf_prune` costs nothing, and transformers and timm know pruned models from the moment they are there.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def when_imported(name: str, do: Callable[[], Any]) -> None:
    """Call a function once, after the module of that name was imported."""
    if name in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Finder(name, do))


class _Finder(MetaPathFinder):
    """Steps aside as soon as it is asked for its module, so that the next finders answer."""

    def __init__(self, name: str, do: Callable[[], Any]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the others find, with a loader that calls the function afterwards."""
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.do)
        return spec


class _Then(Loader):
    """Loads a module as another loader does, and does something then."""

    def __init__(self, loader: Any, do: Callable[[], Any]) -> None:
        self.loader, self.do = loader, do

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and what follows."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.do()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
