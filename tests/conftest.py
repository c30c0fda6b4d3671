"""Fixtures for all tests; nothing here may reach the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_models import KINDS, build_dense
from torch import nn


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def dense(kind) -> nn.Module:
    return build_dense(kind)


@pytest.fixture
def vit() -> nn.Module:
    return build_dense("vit")
