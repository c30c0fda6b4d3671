"""Recipes run in the process of the test."""

import importlib.util
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from hf_prune.recipe.settings import parse

RECIPES = Path(__file__).parents[1] / "recipes"


def run_recipe(name: str, *arguments: str, folder: Path) -> None:
    """Do what `accelerate launch recipes/<name>.py <arguments>` does, errors as they are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", RECIPES / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    threads = torch.get_num_threads()
    line = [*arguments, "--output_dir", str(folder)]
    try:
        recipe.main(parse(recipe.Settings, line, description=None, embedded=recipe.EMBEDDED_SETTINGS))
    finally:
        torch.set_num_threads(threads)
