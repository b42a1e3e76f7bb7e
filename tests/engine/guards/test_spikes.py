"""A loss is a spike where it lies far above the median of those before it."""

from __future__ import annotations

import pytest

from engine.guards.spikes import ENOUGH, Spikes


def test_a_jump_is_told_by_how_much():
    spikes = Spikes(2.0, [2.0] * ENOUGH)
    assert spikes.times_median(3.9) is None
    assert spikes.times_median(5.0) == pytest.approx(2.5)
    assert spikes.times_median(2.0) is None  # the spike itself did not move the median


def test_nothing_is_a_spike_before_enough_is_known():
    spikes = Spikes(2.0)
    assert [spikes.times_median(loss) for loss in [1.0] * (ENOUGH - 1) + [9.0]] == [None] * ENOUGH
    assert spikes.times_median(9.0) == 9.0


def test_steps_without_a_loss_say_nothing():
    spikes = Spikes(2.0, [None] * 30 + [1.0] * ENOUGH)
    assert spikes.times_median(None) is None and spikes.times_median(3.0) == 3.0


def test_a_loss_that_stays_high_stops_being_a_spike():
    spikes = Spikes(2.0, [1.0] * ENOUGH)
    found = [spikes.times_median(3.0) for _ in range(30)]
    assert found[0] == 3.0 and found[-1] is None


def test_factor_zero_flags_nothing():
    assert Spikes(0.0, [1.0] * ENOUGH).times_median(100.0) is None
