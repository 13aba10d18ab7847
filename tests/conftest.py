import os

import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: sums of another number of threads have other bits


def _ranks(world):
    found = Ranks(world)
    yield found
    found.close()


@pytest.fixture(scope="session")
def two():
    """Two processes that form a group."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def three():
    """Three of them."""
    yield from _ranks(3)
