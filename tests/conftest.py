import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)


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
