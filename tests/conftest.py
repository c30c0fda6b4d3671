"""Fixtures for all tests; nothing here may reach the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several threads that wait for each other beside other work take many times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from tiny_models import KINDS, build_dense
from torch import nn

# What counts is what is found, not how fast a busy machine draws.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def dense(kind) -> nn.Module:
    return build_dense(kind)


@pytest.fixture
def vit() -> nn.Module:
    return build_dense("vit")
