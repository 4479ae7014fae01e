"""Canaries and shadows: parts are as configured, and a session stays on its side."""

from __future__ import annotations

from typing import Any

import pytest
from tests.route.scripted import Replica, ask, door_before, post

from headrace.route.asked import Asked
from headrace.route.config import parse_config
from headrace.route.policy import Policy, position

SESSIONS = [f"session-{number}" for number in range(4000)]
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "Hello!"}]}


def policy(*weights: float, share: float | None = None) -> Policy:
    model: dict[str, Any] = {
        "application": "own",
        "canary": [
            {"application": f"next-{index}", "weight": weight}
            for index, weight in enumerate(weights)
        ],
    }
    if share is not None:
        model["shadow"] = {"application": "copy", "share": share}
    return Policy(parse_config({"models": {"llama": model}}, origin="test"))


def asked(session: str) -> Asked:
    return Asked(b"POST", b"/v1/chat/completions", [(b"x-session-id", session.encode())])


def of_session(session: str) -> Asked:
    request = asked(session)
    request.read_body(b"{}")
    return request


REQUESTS = [of_session(session) for session in SESSIONS]


def sides(policy: Policy) -> dict[str, set[str]]:
    """Which sessions each application gets."""
    found: dict[str, set[str]] = {}
    for session, request in zip(SESSIONS, REQUESTS, strict=True):
        found.setdefault(policy.applications("llama", request)[0], set()).add(session)
    return found


@pytest.mark.parametrize("weights", [(0.1,), (0.5,), (0.1, 0.3), (0.2, 0.2, 0.6)])
def test_parts_are_as_configured(weights: tuple[float, ...]) -> None:
    found = sides(policy(*weights))
    for index, weight in enumerate(weights):
        part = len(found[f"next-{index}"]) / len(SESSIONS)
        assert part == pytest.approx(weight, abs=4 * (weight / len(SESSIONS)) ** 0.5)
    if sum(weights) == 1:
        assert len(found.get("own", ())) <= 1


def test_none_and_all() -> None:
    assert sides(policy()) == sides(policy(0.0)) == {"own": set(SESSIONS)}
    assert sides(policy(1.0)) == {"next-0": set(SESSIONS)}


def test_a_weight_that_grows_only_takes() -> None:
    before, after = sides(policy(0.1)), sides(policy(0.2))
    assert before["next-0"] < after["next-0"]


def test_a_canary_hardly_disturbs_another() -> None:
    before, after = sides(policy(0.1, 0.2)), sides(policy(0.15, 0.2))
    moved = before["next-1"] - after["next-1"]
    assert moved <= after["next-0"]  # what the other one took, and nothing went back
    assert len(moved) < 0.1 * len(before["next-1"])


def test_where_a_canary_has_nobody_the_models_own_answer() -> None:
    assert policy(1.0).applications("llama", REQUESTS[0]) == ("next-0", "own")


def test_what_names_no_model_goes_past_canaries() -> None:
    for path in (b"/v1/files", b"/v1/batches/batch_1", b"/v1/responses/resp_1", b"/v1/other"):
        assert policy(1.0).applications("llama", Asked(b"GET", path, [])) == ("own",)


def test_a_share_is_mirrored_whatever_side_it_went_to() -> None:
    split = policy(0.5, share=0.25)
    pairs = zip(SESSIONS, REQUESTS, strict=True)
    mirrored = {session for session, request in pairs if split.shadow("llama", request) == "copy"}
    assert len(mirrored) / len(SESSIONS) == pytest.approx(0.25, abs=0.03)
    both = mirrored & sides(split)["next-0"]
    assert len(both) / len(mirrored) == pytest.approx(0.5, abs=0.06)
    assert policy().shadow("llama", REQUESTS[0]) is None


def test_a_key_has_the_same_place_in_every_process() -> None:
    assert position("llama/canary-0", "session-1") == pytest.approx(0.05499012750922035)
    assert 0 <= position("", "\udfff") < 1


async def test_weights_change_and_sessions_stay() -> None:
    own, canary = Replica(), Replica()
    await canary.start()

    def file(weight: float) -> dict[str, Any]:
        parts = [{"replicas": [canary.url], "weight": weight}]
        return {"models": {"llama": {"replicas": [own.url], "canary": parts}}}

    async def went(port: int) -> list[bool]:
        """For each session whether the canary answered, which the replicas know."""
        found = []
        for session in SESSIONS[:40]:
            before = len(canary.requests)
            got = await ask(port, post(CHAT, more=f"x-session-id: {session}\r\n"))
            assert got.status == 200
            found.append(len(canary.requests) > before)
        return found

    async with door_before(own) as (door, port):
        shares = []
        for weight in (0.0, 0.4, 0.4, 1.0):
            door.reconfigure(parse_config(file(weight), origin="test"))
            await door.fleet.settle(5)
            shares.append(await went(port))
        assert not any(shares[0]) and all(shares[3])
        assert shares[1] == shares[2] and 4 < sum(shares[1]) < 28
        canary.kill()
        assert not any(await went(port))
