"""How tests look at a configuration's errors."""

import re
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from em_training import describe_error


@contextmanager
def refuses_config(message: str):
    """Expect a configuration to be refused with a plain sentence that matches `message`."""
    with pytest.raises(ValidationError) as refused:
        yield
    sentence = describe_error(refused.value)
    assert re.search(message, sentence), sentence
