"""The schedule against a count, token by token, of where chunks begin and periods end."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from metamem.memory.schedule import schedule

CLOCK = st.integers(1, 12)
CALL = {
    "positions": st.lists(st.integers(0, 40), min_size=1, max_size=4),
    "time": st.integers(0, 40),
    "chunk": CLOCK,
    "periods": st.dictionaries(st.sampled_from(["slow", "slower", "slowest"]), CLOCK, max_size=3),
}


def segments_of(runs):
    return [segment for run in runs for segment in run.segments]


def rows_where(flags):
    """How a schedule names rows: () for all of them, None for none."""
    return () if all(flags) else tuple(flags) if any(flags) else None


@given(**CALL)
def test_segments_tile_the_call_and_runs_tile_the_segments(positions, time, chunk, periods):
    runs = schedule(positions, time, chunk, periods)
    covered = [token for segment in segments_of(runs) for token in range(segment.start, segment.start + segment.length)]
    assert covered == list(range(time))
    assert all(segment.length > 0 for segment in segments_of(runs))
    for run in runs:
        assert {segment.length for segment in run.segments} == {run.length}
        assert run.start == run.segments[0].start
        assert run.stop == run.segments[-1].start + run.length
    assert all(a.length != b.length for a, b in pairwise(runs)), "equal segments make one run"


@given(**CALL)
def test_no_segment_crosses_a_boundary_and_none_ends_without_one(positions, time, chunk, periods):
    clocks = [chunk, *periods.values()]
    boundaries = {
        token for token in range(time + 1) for at in positions for clock in clocks if not (at + token) % clock
    }
    segments = segments_of(schedule(positions, time, chunk, periods))
    for segment in segments:
        assert not boundaries & set(range(segment.start + 1, segment.start + segment.length))
    starts = {segment.start for segment in segments} - {0}
    assert starts == boundaries - {0, time}, "as few segments as the boundaries allow"


@given(**CALL)
def test_refresh_and_fire_are_where_a_count_per_token_has_them(positions, time, chunk, periods):
    segments = segments_of(schedule(positions, time, chunk, periods))
    first = {segment.start: segment for segment in segments}
    last = {segment.start + segment.length - 1: segment for segment in segments}
    read = list(positions)
    for token in range(time):
        begins = rows_where([count % chunk == 0 for count in read])
        assert (first[token].refresh if token in first else None) == begins
        read = [count + 1 for count in read]
        for name, period in periods.items():
            ends = rows_where([count % period == 0 for count in read])
            assert (last[token].fire.get(name) if token in last else None) == ends


@given(**CALL, share=st.integers(1, 5))
def test_rows_at_one_position_are_scheduled_as_one_row(positions, time, chunk, periods, share):
    at = positions[:1]
    assert schedule(at * share, time, chunk, periods) == schedule(at, time, chunk, periods)
