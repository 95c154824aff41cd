"""Tables, lists and amounts as text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows under a header, in columns two spaces apart; the columns in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            if i in right:
                cells.append(cell.rjust(width))
            else:
                cells.append(cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def amount(count: float) -> str:
    """A count for people, three significant digits: 33.6M, 1.2G, 940."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        # a unit begins where three digits of the one below would round up to 1,000
        if count >= limit * 0.9995:
            if count < 999.5 * limit:
                return f"{count / limit:.3g}{unit}"
            return f"{count / limit:.0f}{unit}"
    return f"{count:.0f}"


def listing(names: Iterable[str], most: int = 8) -> str:
    """Names for people, the first of them: "a, b and 3 more"; "none" where there are none."""
    known = list(names)
    if not known:
        return "none"
    shown = ", ".join(known[:most])
    if len(known) > most:
        return f"{shown} and {len(known) - most} more"
    return shown


def common_prefix(names: Sequence[str]) -> str:
    """The common leading components of dotted names, at most all but the last of each."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
