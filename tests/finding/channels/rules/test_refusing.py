"""Operations that no channel passes, and why."""

import pytest
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage

USAGES = [
    ("numbers", lambda x: x.unique(), "x:3,6", "picks positions by the numbers it reads"),
    ("losses", lambda x: F.kl_div(x, 0 * x, reduction="sum"), "x:3,6", "makes one number of all channels"),
    ("positions", lambda x: x.nonzero(), "x:3,6", "picks positions by the numbers it reads"),
]


@pytest.mark.parametrize(("name", "function", "tensors", "reason"), USAGES, ids=lambda item: str(item)[:20])
def test_what_is_read_is_closed_with_the_reason(name, function, tensors, reason):
    found = Usage(name, function, tensors, "").check()
    assert found.reasons["x0"].endswith(reason)
