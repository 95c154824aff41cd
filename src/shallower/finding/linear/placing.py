"""Where an operation stands in the model, as something that can be exchanged: a module, or calls in a forward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from shallower.finding.linear.units import Graph
from shallower.finding.pointwise import UNCHANGED
from shallower.modules.rewriting import Known, reason_not_rewritable
from shallower.recording.tracing import Call, Frame
from shallower.sites import Place


class Placing:
    """Where the operations of a graph stand in the model."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.forwards: Known = {}

    def place_of(self, executions: Sequence[Sequence[Call]]) -> tuple[Place | None, str]:
        """Where an activation stands, from the calls of all its executions; or why it cannot be exchanged."""
        chains = [set(chain) for chain in executions]
        frames = [self.frame_of(chain) for chain in chains]
        owners = [self.exact_frame(chain, frame) for chain, frame in zip(chains, frames, strict=True)]
        exact = [frame for frame in owners if frame is not None]
        if len(exact) == len(chains):
            problem = self.graph.hook_problem(exact[0].module)
            if problem:
                return None, problem
            # PyTorch's fused encoder path passes the activation by: externalising it switches that path off.
            fused = any(isinstance(f.parent.module, nn.TransformerEncoderLayer) for f in exact if f.parent)
            place, problem = (None, "") if fused else self.module_place(exact)
            if place is not None or problem:
                return place, problem
        places = set()
        reasons = []
        for chain, frame, owner in zip(chains, frames, owners, strict=True):
            outer = owner.parent if owner is not None else frame
            place, problem = self.call_place(chain, outer)
            places.add(place)
            reasons.append(problem)
        if any(reasons):
            return None, next(reason for reason in reasons if reason)
        if len(places) != 1:
            return None, "its activation stands at different places in different calls"
        return places.pop(), ""

    def frame_of(self, chain: set[Call]) -> Frame:
        """The innermost frame that holds all calls of a chain."""
        first, *others = chain
        for frame in first.frame.ancestors():
            if all(frame in other.frame.ancestors() for other in others):
                return frame
        return self.graph.trace.root

    def exact_frame(self, chain: set[Call], frame: Frame) -> Frame | None:
        """`frame` if it does what the chain does and nothing else."""
        if any(call not in chain and call.outputs and call.name not in UNCHANGED for call in frame.calls()):
            return None
        return frame if frame.module in self.graph.names else None

    def owner_of(self, chain: set[Call]) -> Frame | None:
        """The module invocation that is the chain and nothing else, None where there is none."""
        return self.exact_frame(chain, self.frame_of(chain))

    def module_place(self, exact: Sequence[Frame]) -> tuple[Place | None, str]:
        """The activation as a module that can be exchanged by its name; None where it is called elsewhere too."""
        module = exact[0].module
        if any(frame.module is not module for frame in exact):
            return None, "different activation modules are used in different calls"
        if len(self.graph.frames[module]) == len(exact) and len(self.graph.holders.get(module, ())) == 1:
            return Place(self.graph.names[module][0]), ""
        # A shared object. It can still be exchanged where each user reaches it by an attribute of its own.
        paths = {self.path_of(frame) for frame in exact}
        if len(paths) != 1:
            return None, ""
        path = paths.pop()
        elsewhere = [frame for frame in self.graph.frames[module] if frame not in exact]
        if not path or any(self.path_of(frame) in ("", path) for frame in elsewhere):
            return None, ""
        return Place(path), ""

    def path_of(self, frame: Frame) -> str:
        """The dotted name by which a frame's caller reached its module, "" where that is not certain."""
        parent = frame.parent
        if parent is None or parent.name is None:
            return ""
        children = [name for name, child in parent.module._modules.items() if child is frame.module]
        prefix = parent.name + "." if parent.name else ""
        if type(parent.module).forward is nn.Sequential.forward:
            steps = [step for step in parent.steps if isinstance(step, Frame)]
            slots = list(parent.module._modules)
            return prefix + slots[steps.index(frame)] if len(steps) == len(slots) else ""
        if len(children) != 1:
            return ""
        return prefix + children[0]

    def call_place(self, chain: set[Call], frame: Frame | None) -> tuple[Place | None, str]:
        """The activation as calls of the enclosing module's own forward."""
        if frame is None or frame.name is None:
            return None, "its activation is called outside of the model's modules"
        calls: list[tuple[str, int]] = []
        made = {value for call in chain for value in call.outputs}
        steps = {_step_of(call, frame) for call in chain}
        at = [i for i, step in enumerate(frame.steps) if step in steps]
        for step in frame.steps[at[0] : at[-1] + 1]:
            if isinstance(step, Call):
                if step in chain:
                    calls.append((step.name, step.ordinal))
                continue
            inner = self._calls(step)
            # A child that hands on what it is given (nn.Identity) is a part of the chain it stands in.
            handed = not inner and calls and made.issuperset(step.outputs)
            if inner & chain or handed:
                if not {call for call in inner if call.outputs} <= chain:
                    return None, f"its activation is only a part of {self.graph.title(step)}"
                name = relative_name(frame.module, step.module)
                if name is None:
                    return (
                        None,
                        f"its activation is called in {self.graph.title(step)}, which {frame.name} does not own",
                    )
                calls.append(("self." + name, step.ordinal))
        place = Place(frame.name, tuple(calls))
        reason = reason_not_rewritable(self.graph.trace.model, place, frame, self.forwards)
        return (None, reason) if reason else (place, "")

    @staticmethod
    def _calls(step: Call | Frame) -> set[Call]:
        return {step} if isinstance(step, Call) else set(step.calls())

    def dropout_place(self, call: Call) -> Place | None:
        """Where a dropout stands, if it can be exchanged there."""
        frame = self.exact_frame({call}, call.frame)
        if frame is not None:
            if self.graph.hook_problem(frame.module):
                return None
            if len(self.graph.frames[frame.module]) == 1 and len(self.graph.holders.get(frame.module, ())) == 1:
                return Place(self.graph.names[frame.module][0])
            path = self.path_of(frame)
            same = [other for other in self.graph.frames[frame.module] if self.path_of(other) in ("", path)]
            if path and same == [frame]:
                return Place(path)
            return self.call_place({call}, frame.parent)[0]
        return self.call_place({call}, call.frame)[0]


def _step_of(call: Call, frame: Frame) -> Call | Frame:
    """The step of a frame in which a call is made."""
    step: Call | Frame = call
    for around in call.frame.ancestors():
        if around is frame:
            break
        step = around
    return step


def relative_name(owner: nn.Module, module: nn.Module) -> str | None:
    """The dotted name of a module below another, None where it is not there."""
    return next((name for name, child in owner.named_modules() if child is module and name), None)
