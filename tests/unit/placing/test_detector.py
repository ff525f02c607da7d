"""Who is dead, and who only seems to be."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.types import PeerId
from pyagent_node.node.detector import (
    ASK_AGAIN_SECONDS,
    BEAT_SECONDS,
    CONFIRM_SECONDS,
    GRACE_SECONDS,
    PAUSE_SECONDS,
    WITNESS_SECONDS,
    WITNESSES,
    AskWitness,
    Detector,
    Probe,
    phi,
)

A, B, C, D, E = (PeerId(name) for name in "ABCDE")


def watching(*peers: PeerId, beats: int = 10) -> tuple[Detector, float]:
    """Return a detector that has heard some beats of each peer, and the time."""
    detector = Detector(0.0)
    now = 0.0
    for peer in (A, B, C, D, E):
        detector.up(peer, now)
    detector.watch(peers, now)
    for _ in range(beats):
        now += BEAT_SECONDS
        detector.tick(now)
        for peer in peers:
            detector.beat(peer, now)
    return detector, now


def pass_time(detector: Detector, now: float, seconds: float) -> float:
    """Let time pass in small steps."""
    end = now + seconds
    while now < end:
        now = min(end, now + 0.25)
        detector.tick(now)
    return now


def test_phi_is_the_logarithm_of_the_chance_that_a_beat_still_comes() -> None:
    assert phi(1.0, 1.0, 0.5) == pytest.approx(math.log10(2))
    assert phi(1.5, 1.0, 0.5) == pytest.approx(-math.log10(0.158655), abs=1e-4)
    assert phi(1e9, 1.0, 0.5) == 300.0


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 10), st.floats(0.01, 10))
def test_phi_grows_with_the_silence(a: float, b: float, mean: float, deviation: float) -> None:
    low, high = sorted((a, b))
    assert 0.0 <= phi(low, mean, deviation) <= phi(high, mean, deviation) <= 300.0


def test_a_peer_that_answers_is_alive() -> None:
    detector, now = watching(A)
    assert detector.health(A, now) == "alive"
    assert detector.questions(now, [B, C]) == []


def test_a_refused_dial_twice_is_a_dead_process() -> None:
    detector, now = watching(A)
    detector.down(A, now)
    assert detector.health(A, now) == "suspect"
    questions = detector.questions(now, [B, C, D, E])
    assert questions == [Probe(A), *(AskWitness(A, w) for w in (B, C, D))]
    assert len(questions) == 1 + WITNESSES
    detector.missed(A, now, refused=True)
    for witness in (B, C, D):
        detector.told(A, witness, now, hears=False)
    assert detector.health(A, now) == "suspect"
    now += CONFIRM_SECONDS
    assert detector.questions(now, [B]) == [Probe(A)]
    detector.missed(A, now, refused=True)
    assert detector.health(A, now) == "dead"


def test_nobody_to_ask_is_no_hindrance() -> None:
    detector, now = watching(A)
    detector.down(A, now)
    for _ in range(2):
        assert detector.questions(now, [A]) == [Probe(A)]
        detector.missed(A, now, refused=True)
        now += CONFIRM_SECONDS
    assert detector.health(A, now) == "dead"


def test_witnesses_that_do_not_answer_are_not_waited_for() -> None:
    detector, now = watching(A)
    detector.down(A, now)
    detector.questions(now, [B])
    detector.missed(A, now, refused=True)
    detector.missed(A, now + CONFIRM_SECONDS, refused=True)
    assert detector.health(A, now + CONFIRM_SECONDS) == "suspect"
    assert detector.health(A, now + WITNESS_SECONDS) == "dead"


@pytest.mark.parametrize("trip", [0.0, 0.06, 0.16, 0.4])
def test_witnesses_far_away_are_given_the_time_that_their_answer_takes(trip: float) -> None:
    detector, now = watching(A)
    detector.tick(now, trip=trip)
    detector.down(A, now)
    detector.questions(now, [B])
    detector.missed(A, now, refused=True)
    detector.missed(A, now + CONFIRM_SECONDS, refused=True)
    answered = now + min(2 * trip, detector.patience - 0.01)
    assert detector.health(A, answered) == "suspect"
    detector.told(A, B, answered, hears=True)
    assert detector.health(A, now + detector.patience) == "suspect"
    assert detector.patience < ASK_AGAIN_SECONDS


def test_a_witness_that_hears_the_peer_saves_it() -> None:
    detector, now = watching(A)
    detector.down(A, now)
    for _ in range(100):
        for question in detector.questions(now, [B]):
            if isinstance(question, Probe):
                detector.missed(A, now, refused=True)
            else:
                detector.told(A, question.witness, now, hears=True)
        assert detector.health(A, now) == "suspect"
        now = pass_time(detector, now, 0.25)


def test_a_witness_may_change_its_mind() -> None:
    detector, now = watching(A)
    detector.down(A, now)
    for _ in range(2):
        detector.questions(now, [B])
        detector.missed(A, now, refused=True)
        now += CONFIRM_SECONDS
    detector.told(A, B, now, hears=False)
    assert detector.health(A, now) == "dead"
    detector.told(A, B, now, hears=True)
    assert detector.health(A, now) == "suspect"
    detector.told(A, B, now, hears=False)
    assert detector.health(A, now) == "dead"


def test_unanswered_dials_take_as_long_as_silence() -> None:
    detector, now = watching(A)
    detector.down(A, now)
    start = now
    while detector.health(A, now) != "dead":
        for question in detector.questions(now, []):
            assert question == Probe(A)
            detector.missed(A, now, refused=False)
        now = pass_time(detector, now, 0.05)
    assert PAUSE_SECONDS < now - start < PAUSE_SECONDS + 3


def test_silence_on_an_open_connection_is_noticed_within_seconds() -> None:
    detector, now = watching(A, B)
    start = now
    while detector.health(A, now) != "dead":
        detector.questions(now, [])
        now = pass_time(detector, now, 0.1)
        if (now - start) % 0.5 < 0.1:
            detector.beat(B, now)
    assert PAUSE_SECONDS < now - start < 5
    assert detector.health(B, now) == "alive"


def test_an_irregular_peer_is_given_more_time() -> None:
    rng = random.Random(5)
    detector = Detector(0.0)
    detector.up(A, 0.0)
    detector.watch([A], 0.0)
    now = 0.0
    for _ in range(60):
        now = pass_time(detector, now, rng.uniform(0.2, 5.0))
        detector.beat(A, now)
    assert detector.health(A, now + 6) == "alive"


def test_one_sign_of_life_ends_all_suspicion() -> None:
    detector, now = watching(A)
    detector.down(A, now)
    for _ in range(2):
        detector.questions(now, [])
        detector.missed(A, now, refused=True)
        now += CONFIRM_SECONDS
    assert detector.health(A, now) == "dead"
    detector.up(A, now)
    assert detector.health(A, now) == "alive"
    detector.down(A, now)
    assert detector.health(A, now) == "suspect"


def test_a_pause_of_our_own_is_nobodys_silence() -> None:
    detector, now = watching(A)
    now += 3600
    detector.tick(now)
    assert detector.health(A, now) == "alive"
    now = pass_time(detector, now, 6)
    detector.questions(now, [])
    assert detector.health(A, now) == "dead"


def test_those_never_heard_of_have_time_to_appear() -> None:
    detector = Detector(100.0)
    detector.watch([A], 100.0)
    now = pass_time(detector, 100.0, GRACE_SECONDS - 1)
    assert detector.health(A, now) == "unknown"
    assert detector.questions(now, [B]) == []
    now = pass_time(detector, now, 2)
    for _ in range(2):
        assert Probe(A) in detector.questions(now, [])
        detector.missed(A, now, refused=True)
        now += CONFIRM_SECONDS
    assert detector.health(A, now) == "dead"


def test_a_new_watcher_knows_what_its_connections_told() -> None:
    """A leader elected after the old one died with a rank must not wait for the rank."""
    detector = Detector(0.0)
    for peer in (A, B):
        detector.up(peer, 0.0)
    now = pass_time(detector, 0.0, 100)
    detector.down(A, now)
    now = pass_time(detector, now, 2)
    assert detector.questions(now, [B]) == []
    detector.watch([A, B], now)
    assert detector.health(B, now) == "alive"
    for _ in range(2):
        detector.questions(now, [])
        detector.missed(A, now, refused=True)
        now += CONFIRM_SECONDS
    assert detector.health(A, now) == "dead"


@given(st.integers(0, 1000))
def test_any_order_of_evidence_is_survived(seed: int) -> None:
    rng = random.Random(seed)
    detector = Detector(0.0)
    now = 0.0
    for _ in range(300):
        now += rng.choice([0.0, 0.01, 0.1, 1.0, 30.0])
        peer, other = rng.choice([A, B, C]), rng.choice([A, B, C])
        match rng.randrange(8):
            case 0:
                detector.up(peer, now)
            case 1:
                detector.down(peer, now)
            case 2:
                detector.beat(peer, now)
            case 3:
                detector.missed(peer, now, refused=rng.random() < 0.5)
            case 4:
                detector.told(peer, other, now, hears=rng.random() < 0.5)
            case 5:
                detector.watch(rng.sample([A, B, C], rng.randrange(4)), now)
            case 6:
                detector.tick(now)
            case _:
                assert len(detector.questions(now, [A, B, C])) <= 3 * (1 + WITNESSES)
        for each in (A, B, C):
            assert detector.health(each, now) in ("unknown", "alive", "suspect", "dead")
            assert detector.silent_for(each, now) >= 0
    detector.watch([A], now)
    detector.up(A, now)
    assert detector.health(A, now) == "alive"
