"""Concepts that are found once and looked at often."""

import shutil

import pytest
from planted_concepts import quick_concepts

from hf_prune.data.concepts.cache import ConceptCache


@pytest.fixture(scope="session")
def found_once(tmp_path_factory):
    return quick_concepts(tmp_path_factory.mktemp("concepts"))


@pytest.fixture
def found(found_once, tmp_path):
    """A copy to spoil."""
    folder = tmp_path / "concepts"
    shutil.copytree(found_once.folder, folder)
    return ConceptCache.open(folder)
