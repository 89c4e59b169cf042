"""For every test: one thread, the same random numbers each time, and a torchvision that imports."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from fxopt.vision import import_torchvision, is_installed

torch.set_num_threads(1)
# how fast examples are made says how busy the machine is, and nothing about what is tested
settings.register_profile("fxopt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fxopt")
if is_installed():
    import_torchvision()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Seed torch, so that a test sees the same weights whichever tests ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
