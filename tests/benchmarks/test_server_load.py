"""What the harness of the servers says of what its clients saw."""

import pytest
import server_load as load


def test_counts_times_and_memory_are_told_apart():
    seen = [("right", 2.0), ("right", 4.0), ("wrong", 3.0), ("429", 1.0), ("left", 0.3)]
    samples = [(second, 700 + second / 60) for second in range(120)]  # 1 MiB a minute
    told = load.summary(seen, samples)
    assert (told["right"], told["wrong"], told["429"], told["left"]) == (2, 1, 1, 1)
    assert told["sentence_s"] == {"p50": 3.0, "p95": 3.9, "p100": 4.0} and told["refusal_s"]["p100"] == 1.0
    assert told["memory"] == [700, 701, 701, 702]
    assert told["mib_per_minute_in_last_half"] == pytest.approx(1.0)


def test_clients_behave_by_their_number():
    visitors = [load.ChatVisitor("http://127.0.0.1:9", number, ["a", "b", "c"]) for number in range(20)]
    assert [visitor.leaves for visitor in visitors].count(True) == 4
    assert [visitor.lies for visitor in visitors].count(True) == 2
    assert not any(visitor.leaves and visitor.lies for visitor in visitors)
    assert {visitor.right for visitor in visitors} == {"a", "b", "c"}
    for visitor in visitors:
        visitor.http.close()
