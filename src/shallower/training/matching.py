"""What a smaller network is to learn from the original, and how far it is from that.

with Teacher(model, Matching()) as teacher:
    loss = teacher.distance(small, lesson)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.core.batches import Batch
from shallower.core.inputs import MaskOf, call, default_mask_of, model_device
from shallower.core.memory import free_bytes
from shallower.core.modes import evaluating
from shallower.core.options import Options, option
from shallower.core.outputs import are_logits
from shallower.core.trees import tensors
from shallower.core.watching import recorded
from shallower.errors import MethodError, TrainingError
from shallower.modules.attachment import attached_places, detached_copy
from shallower.sites import Sites
from shallower.training.accelerating import placed
from shallower.training.divergence import kl_divergence, relative_divergence
from shallower.training.trainable import Trainable

Match = Literal["outputs", "sites"]

_MOST_KEPT = 1 << 30
"""Bytes of the original's outputs, at most; and at most a quarter of what is free."""


@dataclass(frozen=True)
class Matching(Options):
    """What `heal` compares between the two networks.

        sh.heal(small, model, batches, matching=sh.Matching(temperature=2.0))
        sh.heal(small, model, batches, matching=sh.Matching("sites", sites))

    Attributes:
        match: "outputs" compares what the models return: of logits the Kullback-Leibler divergence of the
            distributions, else the squared error relative to the original's output. "sites" compares the output
            of each site's consumers, by the relative squared error, and needs `sites`.
        sites: as found in the original.
        temperature: logits are divided by it; the divergence is multiplied by its square.
        mask_of: picks the mask of padding out of a batch; by default a two-dimensional `attention_mask`.
        output_of: picks the output that matters out of what the model returns.
        logits: whether that output is logits; by default, whether the model calls it so.

    Raises:
        MethodError: the options contradict one another.
    """

    match: Match = "outputs"
    sites: Sites | None = None
    temperature: float = option(1.0, above=0)
    mask_of: MaskOf = default_mask_of
    output_of: OutputOf = default_output_of
    logits: bool | None = None

    def __post_init__(self) -> None:
        """Refuse options that contradict one another."""
        super().__post_init__()
        if (self.match == "sites") != (self.sites is not None):
            raise MethodError("match='sites' needs sites=, as found in the original, and nothing else takes them")

    @property
    def names(self) -> list[str]:
        """The layers whose outputs are compared."""
        return [] if self.sites is None else [m.name for site in self.sites for m in site.consumers]


@dataclass(frozen=True)
class Lesson:
    """A batch, or a part of one.

    Attributes:
        batch: inputs and mask.
        number: by which the original's answer is remembered; -1 for a batch that may not come again.
    """

    batch: Batch
    number: int = -1


class Teacher:
    """The original, and what it answers; answers to numbered lessons are kept where there is room.

    with Teacher(model, Matching(logits=True)) as teacher:
        loss = teacher.distance(small, Lesson(batch, 0))

    Args:
        dense: the original; within the context it is where the student is, and is not changed.
        matching: what is compared.
    """

    def __init__(self, dense: nn.Module, matching: Matching) -> None:
        self.matching = matching
        self.model = dense
        if attached_places(dense):
            self.model = detached_copy(dense)
        self._stack = ExitStack()
        self._kept: dict[int, Tensor] = {}
        self._room = min(_MOST_KEPT, free_bytes() // 4)
        self._logits = matching.logits

    def __enter__(self) -> Teacher:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def distance(self, student: nn.Module, lesson: Lesson, small: nn.Module | None = None) -> Tensor:
        """How far the student's answer is from the original's, a scalar.

        Args:
            student: what is called: the small network, or what wraps it for several processes.
            lesson: on the student's device.
            small: the network itself.
        """
        small = small or student
        self._follow(model_device(small))
        names, batch = self.matching.names, lesson.batch
        if names:
            with evaluating(self.model), recorded(self.model, names, inputs=False) as there:
                call(self.model, batch.inputs)
            with recorded(small, names, inputs=False, keep=_as_it_is) as here:
                call(student, batch.inputs)
            pairs = zip(tensors(here.outputs), tensors(there.outputs), strict=True)
            return torch.stack([relative_divergence(a, b, batch.mask) for a, b in pairs]).mean()
        wanted = self._answer(lesson)
        given = self.matching.output_of(call(student, batch.inputs))
        if self._logits:
            return kl_divergence(given, wanted, batch.mask, self.matching.temperature)
        return relative_divergence(given, wanted, batch.mask)

    def _follow(self, device: torch.device) -> None:
        if model_device(self.model) != device:
            self._stack.enter_context(placed(self.model, device))

    def _answer(self, lesson: Lesson) -> Tensor:
        """What the original returns, of it what matters."""
        if lesson.number in self._kept:
            return self._kept[lesson.number]
        with evaluating(self.model):
            raw = call(self.model, lesson.batch.inputs)
        if self._logits is None:
            self._logits = are_logits(raw)
        wanted = self.matching.output_of(raw).detach()
        if lesson.number >= 0 and wanted.nbytes <= self._room:
            self._room -= wanted.nbytes
            self._kept[lesson.number] = wanted
        return wanted


class Pupil(Trainable):
    """A network in training that runs as in evaluation, but for recurrent layers, whose gradients need their own mode.

    Dropout is noise where the answer is given, and BatchNorm's statistics are the original's: the few rows of a healing
    would make worse ones.

    Args:
        model: what is trained.
        batchnorm: whether BatchNorm normalises by the batch and follows it, all the same.
        identity: of the training: a checkpoint of another one is refused.
    """

    def __init__(self, model: nn.Module, batchnorm: bool = False, identity: str = "") -> None:
        super().__init__(model)
        self._identity = identity
        kinds: tuple[type[nn.Module], ...] = (nn.RNNBase,)
        if batchnorm:
            kinds = (nn.RNNBase, _BatchNorm)
        self._training = [module for module in model.modules() if isinstance(module, kinds)]

    def before_step(self) -> None:
        """Set the modes, which the loop has set for training."""
        for module in self.model.modules():
            module.training = False
        for module in self._training:
            module.training = True

    def state_dict(self) -> dict[str, Any]:
        """What the training is."""
        return {"identity": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of another training.

        Raises:
            TrainingError: it is one.
        """
        if state.get("identity") != self._identity:
            raise TrainingError(
                "the checkpoint is of another healing (other weights, batches or options): delete it, or pass another "
                "path"
            )


def _as_it_is(tensor: Tensor) -> Tensor:
    """With its history, for the backward pass."""
    return tensor
