from __future__ import annotations

from llorch.control.refusals import MAX_IN_ALL, MAX_OF_A_PEER, MAX_PEERS, Refusals


def test_the_first_of_a_peer_are_told_one_by_one_and_the_rest_as_a_sum() -> None:
    refusals = Refusals()
    told = sum(refusals.refused("192.0.2.1") for _ in range(1_000))
    assert told == MAX_OF_A_PEER
    assert refusals.refused("192.0.2.2")
    assert refusals.sums() == {"192.0.2.1": 1_000 - MAX_OF_A_PEER}
    assert refusals.sums() == {}
    assert refusals.refused("192.0.2.1")


def test_many_peers_together_are_bounded_and_none_is_forgotten() -> None:
    refusals = Refusals()
    count = 3 * MAX_PEERS
    told = sum(refusals.refused(f"peer-{number}") for number in range(count))
    assert told == MAX_IN_ALL
    sums = refusals.sums()
    assert sum(sums.values()) + told == count
    assert len(sums) <= MAX_PEERS + 1
    assert sums[None] == count - MAX_PEERS
    assert refusals.refused("peer-0")  # another window
