"""Every error that Shallower raises on purpose.

An error says which module is concerned, what is wrong, and what to do about it. Each class is also the error of Python
that fits, so that `except ValueError` catches what a user of torch expects it to catch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done, where that is an answer and not an error; None stands for "it can".

    refusal = site.bridge.not_linear
    if refusal is not None:
        print(refusal.reason)
    """

    reason: str

    def __str__(self) -> str:
        return self.reason


class ShallowerError(Exception):
    """Base of all errors raised by Shallower. Catch this one to catch them all."""


class SiteError(ShallowerError, ValueError):
    """A model, its example inputs or a selection of sites cannot be used."""


class ForwardError(ShallowerError, RuntimeError):
    """A model failed in its own forward pass; `__cause__` is the error it raised."""


class OutOfMemoryError(ShallowerError, MemoryError):
    """There is not enough memory, on a device or in the machine."""


class PlanError(ShallowerError, ValueError):
    """A plan is malformed, or does not fit the model it is applied to."""


class SurgeryError(ShallowerError, RuntimeError):
    """The network after surgery differs from the simulated one beyond rounding."""


class FitError(ShallowerError, ValueError):
    """Moments or weights from which nothing can be fitted."""


class TargetError(ShallowerError, ValueError):
    """A target that cannot be read, or that no plan can meet."""


class MethodError(ShallowerError, RuntimeError):
    """A method is used in a way it does not allow."""


class TrainingError(ShallowerError, RuntimeError):
    """The built-in training loop cannot start, resume or go on."""


class CheckpointError(ShallowerError, ValueError):
    """A saved directory cannot be written, read or trusted."""


class ModelError(ShallowerError, ValueError):
    """A model cannot be built or loaded from its description."""


class DataError(ShallowerError, ValueError):
    """A data set cannot be read or does not hold what the task needs."""


class ExportError(ShallowerError, RuntimeError):
    """A model cannot be written as ONNX or .pt2, or what was written answers differently."""


class ReportError(ShallowerError, ValueError):
    """A directory from which no report or model card can be made."""
