"""Foreign errors become one sentence, and a lack of memory is called that."""

from __future__ import annotations

import errno

import pytest
import torch

from shallower.core.failures import failing, is_out_of_memory, sentence
from shallower.errors import DataError, OutOfMemoryError, PlanError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8.00 GiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB free."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes. Error code 12"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_is_called_that(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert sentence(error).startswith("out of memory")
    with pytest.raises(OutOfMemoryError, match="x: out of memory"), failing(DataError, "x"):
        raise error


def test_how_much_memory_was_asked_for_is_said() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert "bytes asked for" in sentence(raised.value)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (ValueError(), "ValueError"),
        (PlanError("a plan"), "a plan"),
    ],
)
def test_an_error_is_one_line(error: Exception, text: str) -> None:
    assert not is_out_of_memory(error)
    assert sentence(error) == text


def test_errors_of_our_own_and_named_ones_pass() -> None:
    with pytest.raises(PlanError), failing(DataError, "x"):
        raise PlanError("own")
    with pytest.raises(StopIteration), failing(DataError, "x", through=(StopIteration,)):
        raise StopIteration
    with pytest.raises(KeyboardInterrupt), failing(DataError, "x"):
        raise KeyboardInterrupt


def test_advice_comes_last_and_the_cause_is_kept() -> None:
    sentence = r"^rows\.csv: KeyError: 'a'\. Name the column$"
    with pytest.raises(DataError, match=sentence) as raised, failing(DataError, "rows.csv", "Name the column"):
        raise KeyError("a")
    assert isinstance(raised.value.__cause__, KeyError)
