"""What is decided about versions, for any order in which folders change and work ends."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.hosting.rollout import Content, Do, Phase, Policy, Rollout
from headrace.hosting.version_folder import parse_policy

NUMBERS = (1, 2, 3, 4)


def content(mark: int) -> Content:
    return (("model.gguf", mark, 0, 0),)


class World:
    """A folder, engines of which so many fit, and the work that a rollout has begun."""

    def __init__(self, policy: Policy, room: int) -> None:
        self.rollout = Rollout(policy)
        self.policy = policy
        self.room = room
        self.files: dict[int, tuple[int, bool, bool]] = {}
        """Version -> mark of its content, whether it can be loaded, whether it still changes."""
        self.work: dict[int, Do] = {}
        self.read: dict[int, tuple[int, bool, bool]] = {}
        """What a load found."""
        self.loads: list[tuple[int, int]] = []
        self.engines: set[int] = set()
        self.lossless = True
        """So far nothing had to stop before something else could be loaded."""

    def look(self) -> None:
        self.rollout.look(
            {n: None if changes else content(mark) for n, (mark, _, changes) in self.files.items()}
        )
        self.act()

    def act(self) -> None:
        for what, number in self.rollout.decide():
            self.begin(what, number)
        self.check()

    def begin(self, what: Do, number: int) -> None:
        if what is Do.LOAD:
            assert number not in self.work and number not in self.engines
            self.work[number] = what
            # It may have gone since the folder was looked at.
            self.read[number] = self.files.get(number, (-1, False, False))
            self.loads.append((number, self.read[number][0]))
        elif what is Do.ABANDON:
            assert self.work[number] is Do.LOAD
            self.work[number] = what
        elif what is Do.READMIT:
            assert self.work.pop(number) in (Do.DRAIN, Do.HURRY)
        else:
            assert number in self.engines and number not in self.work
            if what is Do.HURRY:
                assert not self.work, "what is going already may make room enough"
            self.work[number] = what
            self.lossless = self.lossless and what is Do.DRAIN

    def finish(self, number: int) -> None:
        """One step of the work on a version."""
        what = self.work.pop(number)
        if what is Do.LOAD:
            self.end_load(number)
        elif what is Do.ABANDON:
            self.engines.discard(number)
            self.rollout.unloaded(number)
        elif self.rollout.versions[number].phase is Phase.DRAINING:
            self.rollout.closing(number)
            self.work[number] = what
        else:
            self.engines.remove(number)
            self.rollout.unloaded(number)
        self.act()

    def end_load(self, number: int) -> None:
        if len(self.engines) >= self.room:
            if (action := self.rollout.no_room(number, "no room")) is not None:
                self.begin(*action)
        elif self.read[number][1]:
            self.engines.add(number)
            self.rollout.loaded(number)
        else:
            self.rollout.failed(number, "broken")

    def die(self, number: int) -> None:
        self.engines.remove(number)
        self.rollout.failed(number, "died")
        # It does not come back as it is.
        mark, _, changes = self.files.get(number, (0, False, False))
        if number in self.files:
            self.files[number] = (mark, False, changes)
        self.act()

    def check(self) -> None:
        assert len(self.engines) <= self.room
        assert set(self.rollout.serving()) <= self.engines
        phases = [version.phase for version in self.rollout.versions.values()]
        assert phases.count(Phase.LOADING) <= 1

    def settle(self) -> None:
        """The folder stays as it is, and all work ends."""
        self.files = {n: (mark, good, False) for n, (mark, good, _) in self.files.items()}
        for _ in range(100):
            self.look()
            if not self.work:
                return
            self.finish(min(self.work))
        raise AssertionError(f"it never ends: {self.rollout.versions}, {self.work}")


policies = st.sampled_from([Policy("latest"), Policy("all"), Policy("specific", frozenset((2, 3)))])
events = st.lists(
    st.tuples(
        st.sampled_from(("put", "put", "copy", "remove", "look", "finish", "finish", "die")),
        st.sampled_from(NUMBERS),
        st.booleans(),
    ),
    max_size=40,
)


def play(world: World, happened: list[tuple[str, int, bool]]) -> None:
    for mark, (what, number, good) in enumerate(happened):
        served = bool(world.rollout.serving())
        match what:
            case "put":
                world.files[number] = (mark, good, False)
            case "copy":
                world.files[number] = (mark, good, True)
            case "remove":
                world.files.pop(number, None)
            case "look":
                world.look()
            case "finish" if world.work:
                world.finish(sorted(world.work)[number % len(world.work)])
            case "die" if number in world.rollout.serving() and number not in world.work:
                world.die(number)
                continue
        if world.lossless and served:
            assert world.rollout.serving(), f"nothing serves after {what} {number}"


@settings(max_examples=150, deadline=None)
@given(policies, st.integers(1, 5), events)
def test_some_version_serves_once_any_could_be_loaded(policy, room, happened):
    world = World(policy, room)
    play(world, happened)
    serving = world.rollout.serving()
    world.settle()
    loadable = policy.choose(n for n, (_, good, _) in world.files.items() if good)
    if policy.kind == "latest" and loadable:
        # It may be one that was loaded, and whose files were overwritten since.
        (version,) = world.rollout.serving()
        assert version in world.files and version >= max(loadable)
    elif room > len(NUMBERS):
        assert loadable <= set(world.rollout.serving())
    assert world.rollout.serving() or not loadable
    assert not (world.rollout.is_lost() and world.rollout.serving())
    if world.lossless and serving:
        assert world.rollout.serving()


@settings(max_examples=100, deadline=None)
@given(policies, events)
def test_a_version_that_fails_is_tried_once_until_its_files_change(policy, happened):
    world = World(policy, 5)
    play(world, [event for event in happened if event[0] != "die"])
    world.settle()
    broken = {n for n, (_, good, _) in world.files.items() if not good}
    before = len(world.loads)
    for _ in range(3):
        world.settle()
    assert len(world.loads) == before
    for number in broken & policy.choose(world.files) & world.rollout.versions.keys():
        assert world.rollout.versions[number].phase in (Phase.FAILED, Phase.READY)


def ready(world: World, *numbers: int) -> None:
    for number in numbers:
        world.files[number] = (number, True, False)
    world.settle()


def test_a_new_version_takes_over_and_the_old_one_drains():
    world = World(Policy("latest"), 2)
    ready(world, 1)
    world.files[2] = (2, True, False)
    world.look()
    assert (world.rollout.serving(), world.work) == ([1], {2: Do.LOAD})
    world.finish(2)
    assert (world.rollout.serving(), world.work) == ([2], {1: Do.DRAIN})
    assert world.rollout.unserved() == [(1, "draining", "")]
    world.settle()
    assert (world.rollout.serving(), world.engines) == ([2], {2})


def test_an_old_version_that_still_drains_is_taken_back_at_once():
    world = World(Policy("latest"), 2)
    ready(world, 1)
    world.files[2] = (2, True, False)
    world.look()
    world.finish(2)
    del world.files[2]
    world.look()
    assert world.rollout.serving() == [1]
    assert world.work == {2: Do.DRAIN}
    assert len(world.loads) == 2, "it was not loaded again"


def test_where_there_is_no_room_for_two_the_old_one_goes_first():
    world = World(Policy("latest"), 1)
    ready(world, 1)
    world.files[2] = (2, True, False)
    world.look()
    world.finish(2)
    assert (world.rollout.serving(), world.work) == ([], {1: Do.HURRY})
    assert (2, "loading", "") in world.rollout.unserved()
    world.settle()
    assert world.rollout.serving() == [2]


def test_what_drains_already_is_waited_for_before_the_next_one_goes():
    world = World(Policy("latest"), 2)
    ready(world, 1)
    world.files[2] = (2, True, False)
    world.look()
    world.finish(2)
    world.files[3] = (3, True, False)
    world.look()
    world.finish(3)
    assert (world.rollout.serving(), world.work) == ([2], {1: Do.DRAIN})
    world.settle()
    assert (world.rollout.serving(), world.lossless) == ([3], True)


def test_a_version_without_room_waits_for_one_that_goes():
    world = World(Policy("all"), 2)
    ready(world, 1, 2)
    del world.files[1]
    world.files[3] = (3, True, False)
    world.look()
    assert world.work == {1: Do.DRAIN, 3: Do.LOAD}
    world.finish(3)
    assert world.rollout.unserved() == [(3, "loading", ""), (1, "draining", "")]
    world.settle()
    assert world.rollout.serving() == [3, 2]


def test_without_room_a_version_that_fails_brings_the_old_one_back():
    world = World(Policy("latest"), 1)
    ready(world, 1)
    world.files[2] = (2, False, False)
    world.settle()
    assert world.rollout.serving() == [1]
    assert world.rollout.unserved() == [(2, "failed", "broken")]


def test_what_is_wanted_makes_no_room():
    world = World(Policy("all"), 2)
    ready(world, 1, 2, 3)
    assert world.rollout.serving() == [3, 2]
    assert world.rollout.unserved() == [(1, "failed", "no room")]


def test_the_last_version_stays_when_its_folder_goes():
    world = World(Policy("latest"), 2)
    ready(world, 1)
    world.files.clear()
    world.settle()
    assert world.rollout.serving() == [1]
    assert not world.rollout.is_lost()


def test_a_load_that_is_not_wanted_any_more_is_given_up():
    world = World(Policy("latest"), 3)
    ready(world, 1)
    world.files[2] = (2, True, False)
    world.look()
    world.files[3] = (3, True, False)
    world.look()
    assert world.work == {2: Do.ABANDON, 3: Do.LOAD}
    world.settle()
    assert world.engines == {3}


def test_lost_means_that_nothing_can_be_tried():
    world = World(Policy("latest"), 2)
    world.files[1] = (1, False, False)
    world.files[2] = (2, True, True)
    world.look()
    assert not world.rollout.is_lost(), "1 is being loaded"
    world.finish(1)
    assert not world.rollout.is_lost(), "2 is being copied"
    del world.files[2]
    world.look()
    assert world.rollout.is_lost()
    world.files[1] = (5, True, False)
    world.settle()
    assert world.rollout.serving() == [1]


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("latest", Policy("latest")),
        ("all", Policy("all")),
        ("2, 3", Policy("specific", frozenset((2, 3)))),
    ],
)
def test_policies(text, policy):
    assert parse_policy(text) == policy
    assert dataclasses.replace(policy).choose([]) == set()


@pytest.mark.parametrize("text", ["newest", "2,x", "", "-1", "2;3"])
def test_policies_that_are_none(text):
    with pytest.raises(ConfigError, match="--model-versions"):
        parse_policy(text)
