import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Equality to the bit holds on one thread, and tests run side by side."""
    torch.set_num_threads(1)
