from __future__ import annotations

import pytest

from shallower.errors import TargetError
from shallower.planning.costs import Cost
from shallower.planning.targets import Target, shortest_prefix

DENSE = Cost(params=1000, macs=2000, size=4000, latency=0.5)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("params:50%", 500),
        ("macs:60%", 1200),
        ("memory:1KB", 1000),
        ("memory:1KiB", 1024),
        ("params:0.4k", 400),
        ("macs:2x", 1000),
        ("latency:2x", 0.25),
        ("latency:100ms", 0.1),
        (" Params : 25 % ", 250),
    ],
)
def test_limit_is_what_may_remain(text: str, limit: float) -> None:
    assert Target.parse(text).limit(DENSE) == pytest.approx(limit)


@pytest.mark.parametrize(("text", "floor"), [("drop:1%", 0.891), ("drop:0.05", 0.85), ("drop:0", 0.9)])
def test_drop_gives_the_lowest_score_allowed(text: str, floor: float) -> None:
    assert Target.parse(text).floor(0.9) == pytest.approx(floor)


def test_drop_of_a_negative_score_allows_a_lower_one() -> None:
    assert Target.parse("drop:10%").floor(-2.0) == pytest.approx(-2.2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "params",
        "50%",
        "flops:50%",
        "params:-5%",
        "params:100%",
        "params:0%",
        "latency:1x",
        "latency:5",
        "macs:3ms",
        "params:10MB",
        "drop:2x",
        "drop:100%",
        "params:nan",
        "params:1e400",
        "drop:5M",
        "macs:50%%",
        "params:0",
    ],
)
def test_unreadable_targets_are_refused(text: str) -> None:
    with pytest.raises(TargetError):
        Target.parse(text)


@pytest.mark.parametrize("text", ["params:50%", "macs:2x", "drop:1%", "drop:0.5", "memory:40MB", "latency:3ms"])
def test_text_of_a_target_reads_back(text: str) -> None:
    target = Target.parse(text)
    assert Target.parse(str(target)) == target


def test_latency_target_needs_a_measured_latency() -> None:
    with pytest.raises(TargetError, match="measured"):
        Target.parse("latency:2x").met(Cost(1, 1, 1), DENSE)


def test_shortest_prefix_takes_no_more_than_needed() -> None:
    def cost(taken: object) -> Cost:
        return Cost(params=1000 - 150 * len(taken), macs=0, size=0)  # type: ignore[arg-type]

    for percentage, prefix in ((90, "a"), (85, "a"), (70, "ab"), (60, "abc"), (40, "abcd")):
        assert shortest_prefix("abcd", Target.parse(f"params:{percentage}%"), DENSE, cost) == prefix


def test_shortest_prefix_tries_few_of_many() -> None:
    tried: list[int] = []

    def cost(taken: range) -> Cost:
        tried.append(len(taken))
        return Cost(params=1000 - len(taken), macs=0, size=0)

    assert shortest_prefix(range(500), Target.parse("params:70%"), DENSE, cost) == range(300)
    assert len(tried) <= 10


def test_shortest_prefix_says_how_far_all_get() -> None:
    def cost(taken: object) -> Cost:
        return Cost(params=1000 - 100 * len(taken), macs=0, size=0)  # type: ignore[arg-type]

    with pytest.raises(TargetError, match=r"asks for 10\.0% .* reach 60\.0%"):
        shortest_prefix("abcd", Target.parse("params:10%"), DENSE, cost)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("params:7B", "params", 7e9), ("size:40MB", "size", 4e7), ("memory:40MB", "size", 4e7), ("kv:512B", "kv", 512)],
)
def test_params_count_in_billions_and_sizes_in_bytes(text: str, unit: str, value: float) -> None:
    target = Target.parse(text)
    assert (target.unit, target.value) == (unit, value)


def test_less_than_one_parameter_is_a_share_that_lacks_its_sign() -> None:
    with pytest.raises(TargetError, match=r"params:50%"):
        Target.parse("params:0.5")


def test_a_kv_cache_is_limited_where_it_was_counted() -> None:
    assert Target.parse("kv:50%").met(Cost(1, 1, 1, kv=100), Cost(1, 1, 1, kv=50))
    with pytest.raises(TargetError, match="KV cache"):
        Target.parse("kv:50%").limit(DENSE)


def test_a_target_is_read_from_itself() -> None:
    target = Target.parse("macs:60%")
    assert Target.parse(target) is target
