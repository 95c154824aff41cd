"""Which channels are zero where the weights that make them are zero.

A sum over channels without weights (a length, q k^T) is the same over fewer channels only where those that go
would add zeros: a cut leaves them out, simulation sets their weights to zero. Where they would add other numbers, a
plain sum or product is taken as an average is: of the channels that stay.
"""

from __future__ import annotations

from collections.abc import Iterator

from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Layout, Run, all_runs, close, runs
from shallower.recording.tracing import Call, Value

LINEAR = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "addmm",
    "baddbmm", "matmul", "mm", "bmm", "einsum", "bilinear", "grouped_mm", "embedding",
    "multi_head_attention_forward",
}  # fmt: skip
"""Maps whose results are zero where their rows, or the channels that pass, are."""

KEEPS_ZERO = {
    "relu", "relu6", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "selu", "celu", "mish", "softsign",
    "erf", "abs", "square", "neg", "sin", "atan", "sign", "sqrt", "tanhshrink", "softshrink", "hardshrink", "expm1",
    "log1p", "prelu", "round", "floor", "ceil", "trunc", "positive", "sum", "mean", "batch_norm",
    "layer_norm", "rms_norm", "group_norm", "instance_norm", "normalize", "max_pool1d", "max_pool2d", "max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "interpolate", "cat", "concat", "concatenate", "stack", "split", "chunk", "unbind", "getitem", "select",
    "narrow", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "t", "get.T", "get.mT",
    "movedim", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "contiguous", "to",
    "type_as", "float", "half", "bfloat16", "double", "type", "clone", "detach", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "flip", "roll", "index_select", "gather", "view_as",
    "reshape_as", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "fold", "alias", "requires_grad",
    "view_as_real", "view_as_complex", "weight_norm",
}  # fmt: skip
"""Functions of zero that are zero, in what their first arguments' channels become."""

FILLS = {"pad", "masked_fill"}
"""Zero where what is put in, or around, is."""

LENGTHS = {
    "normalize", "norm", "vector_norm", "linalg_vector_norm", "cdist", "cosine_similarity", "pairwise_distance",
    "count_nonzero", "dist",
}  # fmt: skip
"""Functions that add up channels of one or two computed tensors."""

SUMS = {"add", "sub", "lerp", "maximum", "minimum", "where", "addcmul"}
"""Zero where all that they read is."""

LEAVE_OUT = {"sum", "nansum", "matmul", "bmm"}
"""Functions that can be made to read only some channels, as those that take averages can."""

REASON = "adds up channels that are not zero when their weights are"


def close_sums(f: Following) -> None:
    """Close the channels that are added up without weights, may not be zero, and cannot be left out."""
    zero = _Zeros(f)
    for layout, call in (*f.contracted, *_lengths(f)):
        for run in set(runs(layout)):
            if run.closed:
                continue
            zeros: list[bool] = []
            for value in call.inputs:
                if run in zero.held(value):
                    zeros.append(zero.of(value, run))
            # a product is zero where one factor is, a distance where both are
            right = any(zeros)
            if call.name in LENGTHS:
                right = all(zeros)
            if zeros and not right and _may_leave_out(call):
                run.marks.add("averaged")
                f.averages.append((run, call))
            elif zeros and not right:
                close(run, f"{f.title(call)} {REASON}")


def _may_leave_out(call: Call) -> bool:
    """Whether simulation can let a call add up the channels that stay alone."""
    return call.name in LEAVE_OUT and not _is_turned(call)


def _lengths(f: Following) -> Iterator[tuple[Layout, Call]]:
    """The channels that functions without a rule of sums add up all the same."""
    for call in f.trace.calls:
        if call.name not in LENGTHS or not call.outputs:
            continue
        for value in call.inputs:
            for axis in f.axes(value):
                yield axis, call


class _Zeros:
    """Which channels are zero in which values when all parameters are zero there."""

    def __init__(self, f: Following) -> None:
        self.f = f
        self._known: dict[tuple[Value, Run], bool] = {}
        self._held: dict[Value, set[Run]] = {}

    def held(self, value: Value) -> set[Run]:
        """The channels that stand in a value."""
        if value not in self._held:
            self._held[value] = set(all_runs(self.f.axes(value)))
        return self._held[value]

    def of(self, value: Value, run: Run) -> bool:
        """Whether the channels of a run are."""
        known, waiting = self._known, [(value, False)]
        while waiting:
            current, done = waiting.pop()
            if (current, run) in known:
                continue
            if current in self.f.unchosen and run in set(runs(self.f.unchosen[current])):
                known[current, run] = True
                continue
            sources = self._sources(current, run)
            if not done and sources:
                waiting.append((current, True))
                waiting += [(source, False) for source in sources if (source, run) not in known]
                continue
            known[current, run] = _follows(current, sources, [known.get((source, run), False) for source in sources])
        return known[value, run]

    def _sources(self, value: Value, run: Run) -> list[Value]:
        """What a value's channels of a run are made of."""
        call = value.call
        if call is None or value.origin in ("parameter", "buffer"):
            return []
        return [source for source in call.inputs if run in self.held(source)]


def _follows(value: Value, sources: list[Value], zeros: list[bool]) -> bool:
    """Whether a value is zero, from whether each of its sources is."""
    call, count = value.call, len(sources)
    if call is None:
        return value.origin in ("parameter", "buffer")
    if count == 0:
        return False
    if call.name in LINEAR or call.name == "mul":
        return any(zeros)
    if call.name in SUMS:
        # a number or a tensor without these channels that is added is not zero
        return all(zeros) and count == len(call.inputs) and not _adds_number(call)
    if call.name == "div":
        return all(zeros) and count == 1 and call.inputs[0] in sources and not _is_turned(call)
    if call.name == "pow":
        exponent = [*call.args[1:], *call.kwargs.values()][0]
        return zeros == [True] and isinstance(exponent, (int, float)) and exponent > 0 and not _is_turned(call)
    if call.name in FILLS:
        filled = sources[0] is call.inputs[0] and zeros[0]
        return filled and not _adds_number(call) and not any(isinstance(item, Value) for item in call.args[2:])
    return call.name in KEEPS_ZERO and all(zeros)


def _is_turned(call: Call) -> bool:
    """Whether it is a number that is divided, or taken to the power of the channels."""
    return str(getattr(call.function, "__name__", "")).startswith("__r")


def _adds_number(call: Call) -> bool:
    """Whether a number other than 0 goes in."""
    given = (*call.args, *call.kwargs.values())
    return any(isinstance(item, (int, float)) and item != 0 for item in given)
