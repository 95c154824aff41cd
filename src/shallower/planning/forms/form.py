"""A site after surgery, as data: which layers remain, and how large they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from shallower.planning.forms.cuts import TensorCut
from shallower.sites import LinearMap, tally

FormKind = Literal["merged", "pair", "apart", "narrower", "partial", "removed", "cut", "gone"]
"""merged    one linear map in each consumer's place; producer and activation are identities
pair      two linear maps with nothing between them, all constants in the consumers' biases
apart     the two layers as they were, with nothing between them and the constants in the producer's bias
narrower  the same layers with fewer channels
partial   kept channels beside a linear path, through a `PartialActivation`
removed   an activation place: the activation is an identity
cut       a followed site: every tensor in which its channels stand is shorter
gone      a branch, or a layer
"""

Through = Literal["channels", "inputs", "outputs"]
"""What each channel of a linear path is: one of the site's or of the fit's, one of the producer's inputs, or one of the
consumers' outputs. All three are exact; the least is taken."""


@dataclass(frozen=True)
class Form:
    """A site after surgery.

    Attributes:
        kind: see `FormKind`.
        producer, gate: what they become; None where they become identities or were none.
        consumers: what they become.
        before: parameters and MACs of the site as this entry found it.
        kept: channels that keep their activation.
        rank: channels of the linear path.
        through: what these are.
        constant: whether one more channel carries the constants of the dropped ones, in front of zero padding.
        inside: whether the constants of the linear path stay in the producer's bias, in front of the consumers; else
            they go into the consumers' biases.
        between: what the depthwise convolutions between become.
        slopes: parameters of the kept channels' slope activation.
        activation: parameters of the activation itself.
        norms: parameters of the BatchNorms that remain.
        products: MACs of attention's products with the sequence.
        cuts: what becomes of the tensors of a followed site.
        why: why the layers do not merge into one; in "merged", why they should not have.
    """

    kind: FormKind
    producer: LinearMap | None
    gate: LinearMap | None
    consumers: tuple[LinearMap, ...]
    before: tuple[int, int]
    kept: int = 0
    rank: int = 0
    through: Through = "channels"
    constant: bool = False
    inside: bool = False
    between: tuple[LinearMap, ...] = ()
    slopes: int = 0
    activation: int = 0
    norms: int = 0
    products: int = 0
    cuts: tuple[TensorCut, ...] = ()
    why: str = ""

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """The linear maps that remain."""
        made = filter(None, (self.gate, self.producer))
        return (*made, *self.between, *self.consumers)

    @property
    def width(self) -> int:
        """Channels between producer and consumers."""
        return self.kept + self.rank + self.constant

    @property
    def params_before(self) -> int:
        """Parameters of the site as this entry found it."""
        return self.before[0]

    @property
    def macs_before(self) -> int:
        """MACs of the site as this entry found it."""
        return self.before[1]

    @property
    def params(self) -> int:
        """Weights, biases, BatchNorm scales and shifts, slopes and the activation's own parameters."""
        followed = sum(cut.elements[1] for cut in self.cuts if cut.trained)
        return tally(self.maps).params + self.norms + self.slopes + self.activation + followed

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations on the example inputs that the sites were found with."""
        followed = sum(cut.macs[1] for cut in self.cuts)
        return tally(self.maps).macs + self.products + followed

    @property
    def cheaper(self) -> bool:
        """Whether the site has fewer parameters or fewer MACs than before, or an operation less at the same cost."""
        gone = self.kind == "removed" or (
            self.kind == "apart" and self.params <= self.params_before and self.macs <= self.macs_before
        )
        return gone or self.params < self.params_before or self.macs < self.macs_before


def totals(forms: Iterable[Form]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(parameters, MACs) of some sites before and after surgery, all together."""
    params_before = macs_before = params = macs = 0
    for form in forms:
        params_before += form.params_before
        macs_before += form.macs_before
        params += form.params
        macs += form.macs
    return (params_before, macs_before), (params, macs)
