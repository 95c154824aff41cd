"""Tables, lists and amounts as text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows under a header, in columns two spaces apart; the columns in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    )


def amount(count: float) -> str:
    """A count for people, three significant digits: 33.6M, 1.2G, 940."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit * 0.9995:
            return f"{count / limit:.3g}{unit}" if count < 999.5 * limit else f"{count / limit:.0f}{unit}"
    return f"{count:.0f}"


def listing(names: Iterable[str], most: int = 8) -> str:
    """Names for people, the first of them: "a, b and 3 more"; "none" where there are none."""
    known = list(names)
    if not known:
        return "none"
    shown = ", ".join(known[:most])
    return shown if len(known) <= most else f"{shown} and {len(known) - most} more"
