"""What is counted here is shown as prometheus_client's own metrics would show it."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from llorch.control.metrics import FAST_S, SLOW_S
from llorch.tally import Tallies

LABELS = st.tuples(st.text(max_size=4), st.sampled_from(["a", 'b"\n\\', ""]))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)
COUNTS = st.floats(0, 2.0**40, allow_nan=False)
BOUNDS = st.lists(st.floats(0, 1e9, allow_nan=False), min_size=1, max_size=6, unique=True).map(sorted)


def shown(fill: Callable[[CollectorRegistry], object]) -> list[str]:
    registry = CollectorRegistry()
    fill(registry)
    lines = generate_latest(registry).decode().split("\n")
    return [line for line in lines if "_created" not in line]  # when, of which no tally knows


@settings(max_examples=40)
@given(st.lists(st.tuples(LABELS, COUNTS), max_size=12))
def test_a_counter_is_as_the_librarys(steps: list[tuple[tuple[str, str], float]]) -> None:
    def ours(registry: CollectorRegistry) -> None:
        counter = Tallies(registry).counter("llorch_things", "of a kind", ["kind", "other"])
        for labels, count in steps:
            counter.add(count, *labels)

    def theirs(registry: CollectorRegistry) -> None:
        counter = Counter("llorch_things", "of a kind", ["kind", "other"], registry=registry)
        for labels, count in steps:
            counter.labels(*labels).inc(count)

    assert shown(ours) == shown(theirs)


@settings(max_examples=40)
@given(st.lists(st.tuples(LABELS, NUMBERS, st.booleans()), max_size=12))
def test_a_gauge_is_as_the_librarys(steps: list[tuple[tuple[str, str], float, bool]]) -> None:
    def ours(registry: CollectorRegistry) -> None:
        gauge = Tallies(registry).gauge("llorch_things", "now", ["kind", "other"])
        for labels, number, add in steps:
            (gauge.add if add else gauge.set)(number, *labels)

    def theirs(registry: CollectorRegistry) -> None:
        gauge = Gauge("llorch_things", "now", ["kind", "other"], registry=registry)
        for labels, number, add in steps:
            (gauge.labels(*labels).inc if add else gauge.labels(*labels).set)(number)

    assert shown(ours) == shown(theirs)


def as_the_librarys(bounds: list[float], steps: list[tuple[tuple[str, str], float]]) -> None:
    def ours(registry: CollectorRegistry) -> None:
        spread = Tallies(registry).histogram("llorch_s", "how long", bounds, ["kind", "other"])
        for labels, seconds in steps:
            spread.observe(seconds, *labels)

    def theirs(registry: CollectorRegistry) -> None:
        spread = Histogram("llorch_s", "how long", ["kind", "other"], buckets=bounds, registry=registry)
        for labels, seconds in steps:
            spread.labels(*labels).observe(seconds)

    assert shown(ours) == shown(theirs)


@settings(max_examples=40)
@given(BOUNDS, st.lists(st.tuples(LABELS, NUMBERS), max_size=12))
def test_a_histogram_is_as_the_librarys(bounds: list[float], steps: list[tuple[tuple[str, str], float]]) -> None:
    as_the_librarys(bounds, [*steps, *((("at", "a"), bound) for bound in bounds)])


def test_a_controls_own_bounds_are_shown_as_the_librarys() -> None:
    for bounds in (FAST_S, SLOW_S):
        as_the_librarys(list(bounds), [(("k", "a"), each + more) for each in bounds for more in (-1e-9, 0.0, 1e-9)])


def test_what_has_no_labels_is_there_from_the_beginning() -> None:
    def ours(registry: CollectorRegistry) -> None:
        tallies = Tallies(registry)
        tallies.counter("llorch_a", "a")
        tallies.gauge("llorch_b", "b")
        tallies.histogram("llorch_c", "c", (0.5, 1))
        tallies.counter("llorch_d", "d", ["kind"])

    def theirs(registry: CollectorRegistry) -> None:
        Counter("llorch_a", "a", registry=registry)
        Gauge("llorch_b", "b", registry=registry)
        Histogram("llorch_c", "c", buckets=(0.5, 1), registry=registry)
        Counter("llorch_d", "d", ["kind"], registry=registry)

    assert shown(ours) == shown(theirs)


def test_what_is_counted_after_a_scrape_is_in_the_next() -> None:
    registry = CollectorRegistry()
    counter = Tallies(registry).counter("llorch_things", "of a kind", ["kind"])
    for count in (1, 2, 3):
        counter.add(1, "a")
        assert f'llorch_things_total{{kind="a"}} {count}.0' in generate_latest(registry).decode()
