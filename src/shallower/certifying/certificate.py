"""What `certify` finds, as plain data that result.json holds and people read.

certificate = sh.certify(model, small, test_batches)
certificate.rate, certificate.bound
print(certificate)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from shallower.core.codec import Bounds
from shallower.core.options import Options, option
from shallower.planning.curve import Whole

LEVEL = 0.95
"""Of every bound and interval."""

Share = Annotated[float, Bounds(0, 1)]


@dataclass(frozen=True)
class Estimate:
    """A number found on some rows, and the interval in which 95 % of such samples of rows would have put it.

        certificate.divergence.value, certificate.divergence.low, certificate.divergence.high

    Attributes:
        value: on the rows.
        low, high: percentiles of a bootstrap over rows.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Greedy(Options):
    """How the greedy texts of two language models are compared.

        sh.certify(model, small, batches, greedy=sh.Greedy(prompt=32, tokens=64))

    Attributes:
        prompt: tokens of a row that the text begins with; shorter rows give none.
        tokens: that are then generated.
        texts: how many at most; 0 for none.
    """

    prompt: int = option(16, least=1)
    tokens: int = option(32, least=1)
    texts: int = option(64, least=0)


@dataclass(frozen=True)
class GreedyAgreement:
    """How long the greedy texts of two language models agree.

        certificate.greedy.agreed.value

    Attributes:
        texts: how many pairs.
        prompt: tokens of each prompt.
        tokens: that were generated.
        agreed: how many of them are the same before the first that differs, in the mean over texts.
        identical: how many texts are the same to the end.
    """

    texts: Whole
    prompt: Whole
    tokens: Whole
    agreed: Estimate
    identical: Whole

    def __str__(self) -> str:
        return (
            f"Of {self.tokens} tokens that both write by greedy choice, the first {self.agreed.value:.1f} agree "
            f"({self.agreed.low:.1f} to {self.agreed.high:.1f}; {self.texts} texts after prompts of {self.prompt} "
            f"tokens, {self.identical} of them the same to the end)."
        )


@dataclass(frozen=True)
class Certificate:
    """How a smaller model's answers differ from the original's.

        certificate = sh.certify(model, small, test_batches)
        print(certificate)

    An answer is the class with the largest logit. The bound counts independent rows: where a row has several
    answers (tokens), one position of each is drawn.

    Attributes:
        rows: that were compared, equal ones counted once.
        changed: of these, with another answer; None where there are no answers, only features.
        bound: the rate of changed answers is at most this, with 95 % confidence (one-sided, Clopper-Pearson).
        tokens: answers in all rows together; None where each row has one.
        token_rate: the part of them that changes.
        divergence: mean Kullback-Leibler divergence from the original's distribution, in nats; of features the squared
            error relative to their size.
        cosine: of features, mean cosine of a row's two outputs.
        greedy: of language models, how long their greedy texts agree.
        left_out: rows that the plan was made from, which were not compared.
        seed: of the positions and of the bootstrap.
    """

    rows: Annotated[int, Bounds(1, 2**53)]
    divergence: Estimate
    changed: Whole | None = None
    bound: Share | None = None
    tokens: Whole | None = None
    token_rate: Estimate | None = None
    cosine: Estimate | None = None
    greedy: GreedyAgreement | None = None
    left_out: Whole = 0
    seed: int = 0

    @property
    def rate(self) -> float | None:
        """The part of the rows with another answer."""
        if self.changed is None:
            return None
        return self.changed / self.rows

    @property
    def kind(self) -> Literal["answers", "features"]:
        """What was compared."""
        if self.changed is None:
            return "features"
        return "answers"

    @property
    def short(self) -> str:
        """A cell of a table: "1.6 %, at most 3.0 %"."""
        if self.rate is None or self.bound is None:
            return f"error {self.divergence.value:.2%}"
        return f"{percent(self.rate)}, at most {percent(self.bound)}"

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of it, for people."""
        found = [self._answers()]
        if self.token_rate is not None:
            rate = self.token_rate
            found.append(
                f"Of all {self.tokens:,} positions {percent(rate.value)} change ({percent(rate.low)} to "
                f"{percent(rate.high)})."
            )
        if self.kind == "answers":
            found.append(f"Mean divergence from the original (KL): {self.divergence} nats.")
        if self.greedy is not None:
            found.append(str(self.greedy))
        if self.left_out:
            found.append(f"{self.left_out:,} rows were left out: the plan was made from them.")
        return tuple(found)

    def _answers(self) -> str:
        if self.rate is None or self.bound is None:
            error = self.divergence
            text = (
                f"On {self.rows:,} rows the output differs by {percent(error.value)} of its size, squared "
                f"({percent(error.low)} to {percent(error.high)})"
            )
            if self.cosine is not None:
                text += f", with a mean cosine of {self.cosine.value:.4f}"
            return f"{text}; it is features, not classes, so that no answer can change."
        where = f"Of {self.rows:,} rows {self.changed:,} get another answer than from the original"
        if self.tokens is not None:
            where = f"At one position drawn from each of {self.rows:,} rows, {self.changed:,} answers change"
        return f"{where}: {percent(self.rate)}, and with {LEVEL:.0%} confidence at most {percent(self.bound)}."

    def __str__(self) -> str:
        """The sentences, one a line."""
        return "\n".join(self.sentences)


def percent(part: float) -> str:
    """1.61 %, and more digits of what is small."""
    if part and part < 1e-3:
        return f"{100 * part:.2g} %"
    return f"{100 * part:.2f} %"
