"""Every failure as one line."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest

from shallower.app.failures import DEBUG, foreign_code, one_line, plain_warnings, print_traceback, terminable
from shallower.errors import ModelError, OutOfMemoryError, ShallowerError, SiteError


def caught(error: BaseException) -> BaseException:
    """The error with a traceback that ends here."""
    try:
        raise error
    except BaseException as raised:
        return raised


def test_an_error_raised_on_purpose_keeps_its_words() -> None:
    assert one_line(SiteError("net.3:\n  it is   wrong")) == "net.3: it is wrong"


def test_a_foreign_error_is_named_with_its_place() -> None:
    line = one_line(caught(KeyError("width")))
    assert line.startswith("KeyError: 'width', in caught (test_failures.py, line ")
    assert DEBUG in line


def test_a_disk_error_names_the_file() -> None:
    assert one_line(caught(OSError(28, "No space left on device", "out/x"))) == "out/x: No space left on device"


def test_too_little_memory_has_a_remedy() -> None:
    assert "smaller batches" in one_line(caught(MemoryError()))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyError("x"), ModelError, r"^nets:make, in .* \(test_failures\.py, line \d+\): KeyError: 'x'$"),
        (SystemExit(3), ModelError, r"^nets:make ended the program: sys\.exit\(3\) was called$"),
        (MemoryError(), OutOfMemoryError, "out of memory"),
        (SiteError("net.3 is wrong"), SiteError, r"^net\.3 is wrong$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_in_foreign_code_says_where(error: BaseException, kind: type[ShallowerError], words: str) -> None:
    with pytest.raises(kind, match=words), foreign_code(ModelError, "nets:make"):
        raise error


def test_the_traceback_is_printed_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(DEBUG, raising=False)
    print_traceback(caught(KeyError("x")))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(DEBUG, "1")
    print_traceback(caught(KeyError("x")))
    assert "Traceback" in capsys.readouterr().err


def test_a_termination_is_an_interruption_and_only_meanwhile() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


class Interrupting:
    """Whose end is when somebody presses Ctrl-C."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_an_interruption_in_a_finaliser_is_not_lost() -> None:
    def work() -> None:
        Interrupting()
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt), terminable():
        work()


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with plain_warnings():
        warnings.simplefilter("always")
        warnings.warn("too few\nrows", stacklevel=1)
    assert capsys.readouterr().err == "warning: too few rows\n"
