"""The letters of an einsum, one for each axis.

terms, made = einsum_terms(call)        # [(x, ["b", "i"]), (weight, ["i", "o"])], ["b", "o"]
"""

from __future__ import annotations

from shallower.recording.tracing import Call, Value


def einsum_terms(call: Call) -> tuple[list[tuple[Value, list[str]]], list[str]]:
    """What an einsum reads, each with a letter for every axis, and the letters of what it gives.

    Raises:
        ValueError: it has other operands than its text.
    """
    left, arrow, right = call.args[0].replace(" ", "").partition("->")
    terms: list[tuple[Value, list[str]]] = []
    seen: list[str] = []
    for term, value in zip(left.split(","), _operands(call), strict=True):
        terms.append((value, _spelled(term, len(value.shape))))
        seen += terms[-1][1]
    if not arrow:
        right = _implied(left, seen)
    return terms, _spelled(right, len(call.outputs[0].shape))


def _operands(call: Call) -> list[Value]:
    """Tensors one by one, or in a list."""
    given = call.args[1:]
    if isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    return [item for item in given if isinstance(item, Value)]


def _spelled(term: str, dims: int) -> list[str]:
    """One letter for each axis; those of "..." are numbered from the right."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    count = dims - len(before) - len(after)
    return [*before, *(str(i) for i in range(count, 0, -1)), *after]


def _implied(left: str, seen: list[str]) -> str:
    """The right side where an equation has none: what stands in it once, in the order of the alphabet."""
    once = [letter for letter in sorted(set(seen)) if seen.count(letter) == 1 and not letter.isdigit()]
    return ("..." if "..." in left else "") + "".join(once)
