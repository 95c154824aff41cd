"""How often a smaller model answers otherwise than the original, counted on rows that no decision has seen.

certificate = sh.certify(model, small, test_batches, seen=plan)
print(certificate)      # Of 872 rows 11 get another answer than from the original: 1.26 %, and ... at most 2.09 %.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.certifying.bounds import changed_at_most, ratio_over_rows
from shallower.certifying.certificate import Certificate, Greedy, GreedyAgreement
from shallower.certifying.comparing import ComparedRow, compared_rows
from shallower.certifying.greedy import agreement, prompts_in, writes
from shallower.core.batches import Batches, row_digests
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.outputs import are_logits
from shallower.core.processes import gathered, raised_anywhere
from shallower.core.trees import to_device
from shallower.errors import DataError
from shallower.modules.attachment import attached_places, detached_copy
from shallower.planning.plan import Plan


def certify(
    dense: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    *,
    seen: Plan | Collection[str] = (),
    greedy: Greedy | None = None,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
    output_of: OutputOf = default_output_of,
    logits: bool | None = None,
    seed: int = 0,
) -> Certificate:
    """How often `small` answers otherwise than `dense`, with a bound on what is to come.

        certificate = sh.certify(model, small, test_batches, seen=plan)
        certificate.rate, certificate.bound
        print(certificate)

    The bound holds for rows like these, drawn independently: give rows on which nothing was calibrated, trained or
    chosen. Of several processes each brings rows of its own, and all return the same.

    Args:
        dense: the original.
        small: what was made of it.
        batches: read once; labels are not needed. A tensor, a tuple or a dict each, with a row in dimension 0.
        seen: the plan that `small` was made by, or digests of rows: rows that its calibration has seen are not
            compared, and are counted as left out.
        greedy: how the texts of language models are compared; by default `Greedy()`.
        inputs_of, mask_of: pick the model's inputs and the mask of what counts out of a batch; by default a
            two-dimensional `attention_mask`.
        output_of: picks the output out of what the model returns.
        logits: whether that is logits of classes, whose largest is the answer; by default, whether the model returns
            something that has `logits`. Of everything else (features, embeddings) errors are measured, and no answers.
        seed: of the positions that are drawn and of the bootstrap; no other random numbers are touched.

    Raises:
        DataError: there are no batches, or the plan was made from all of their rows.
        SiteError: the batches can be read only once, or are not what the models take.
        ModelError: the outputs cannot be compared row by row.
        ForwardError: a model fails on a batch.
    """
    greedy = greedy or Greedy()
    known = set(_digests_of(seen))
    original, other = _undecorated(dense), _undecorated(small)
    rows: list[ComparedRow] = []
    prompts: dict[str, Tensor] = {}
    left_out = 0
    classes = logits
    with raised_anywhere():
        for batch in tqdm(Batches.read(batches, inputs_of, mask_of), desc="certifying", delay=5, leave=False):
            raw = [_output(model, batch.inputs) for model in (original, other)]
            if classes is None:
                classes = are_logits(raw[0])
            wanted, given = (output_of(output).detach() for output in raw)
            digests = row_digests(batch)
            for row in compared_rows(given.to(wanted.device), wanted, batch.mask, digests, classes=classes, seed=seed):
                if row.digest in known:
                    left_out += 1
                else:
                    rows.append(row)
            for digest, prompt in zip(digests, prompts_in(batch, greedy.prompt), strict=True):
                if prompt is not None and digest not in known:
                    prompts[digest] = prompt
        found, left = _everybodys(rows), sum(gathered(left_out))
        _refuse_nothing(found, left)
        text = None
        if found[0].several and writes(original) and writes(other):
            text = agreement(original, other, _chosen_prompts(prompts, greedy), greedy, seed)
    return _certificate(found, bool(classes), left, text, seed)


def _chosen_prompts(prompts: dict[str, Tensor], greedy: Greedy) -> list[Tensor]:
    """Some of all processes' prompts, in the order of their digests, which is a random one."""
    everybodys: dict[str, Tensor] = {}
    for own in gathered(prompts):
        everybodys |= own
    return [everybodys[digest] for digest in sorted(everybodys)[: greedy.texts]]


def _certificate(
    rows: Sequence[ComparedRow], classes: bool, left_out: int, text: GreedyAgreement | None, seed: int
) -> Certificate:
    divergence = ratio_over_rows(_field(rows, "error"), _field(rows, "size"), seed)
    if not classes:
        cosine = ratio_over_rows(_field(rows, "cosine"), _field(rows, "positions"), seed)
        return Certificate(len(rows), divergence, cosine=cosine, left_out=left_out, seed=seed)
    changed = int(_field(rows, "sampled").sum())
    bound = changed_at_most(changed, len(rows))
    tokens, rate = None, None
    if rows[0].several:
        positions = _field(rows, "positions")
        tokens, rate = int(positions.sum()), ratio_over_rows(_field(rows, "changed"), positions, seed)
    return Certificate(len(rows), divergence, changed, bound, tokens, rate, None, text, left_out, seed)


def _undecorated(model: nn.Module) -> nn.Module:
    """The model, or a copy with nothing attached."""
    if attached_places(model):
        return detached_copy(model)
    return model


def _output(model: nn.Module, inputs: Any) -> Any:
    with evaluating(model):
        return call(model, to_device(inputs, model_device(model)))


def _digests_of(seen: Plan | Collection[str]) -> Collection[str]:
    if isinstance(seen, Plan):
        return seen.seen
    return seen


def _everybodys(rows: list[ComparedRow]) -> list[ComparedRow]:
    """The rows of all processes, equal ones once: a row that comes twice says nothing new."""
    found: dict[str, ComparedRow] = {}
    for own in gathered(rows):
        for row in own:
            found.setdefault(row.digest, row)
    return list(found.values())


def _refuse_nothing(rows: Sequence[ComparedRow], left_out: int) -> None:
    """Raise DataError where there is nothing to certify on."""
    if rows:
        return
    if left_out:
        raise DataError(
            f"the plan was made from all {left_out:,} rows of `batches`, so they say nothing about rows to come: "
            "certify on others"
        )
    raise DataError("a certificate needs data: `batches` holds no row")


def _field(rows: Sequence[ComparedRow], name: str) -> Tensor:
    """One field of all rows, (rows,) float64."""
    return torch.tensor([float(getattr(row, name)) for row in rows], dtype=torch.float64)
