"""Versions behind the real HTTP app, with engines that are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import TEMPLATE, FakeEngine, byte_tokenizer

from headrace.api.api_config import ApiConfig
from headrace.api.app import create_app
from headrace.api.model_table import ModelTable, ServedModel
from headrace.config import EngineConfig, ServerOptions
from headrace.engine.client import EngineState
from headrace.errors import CheckpointError, EngineError, HeadraceError
from headrace.hosting.fit import Question, Verdict
from headrace.hosting.model_host import HostEvents
from headrace.hosting.version_folder import version_folder
from headrace.hosting.versioned import VersionedModels
from headrace.observability.metrics import Metrics
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace.text.processor import TextProcessor

COMPLETIONS = "/v1/completions"


class Engine(FakeEngine):
    @property
    def num_live(self) -> int:
        return len(self.live)


class Host:
    """As a ModelHost. What is in its version's file says how the load ends."""

    def __init__(
        self, site: Site, names: tuple[str, ...], events: HostEvents, revision: str, version: int
    ) -> None:
        self.tokenizer = byte_tokenizer()
        self.client = Engine(self.tokenizer, answer=f"I am version {version}.", loaded=False)
        self.client.state = EngineState.LOADING
        self.client.on_record = events.on_record
        self.events = events
        self.model = ServedModel(
            name=names[0], client=self.client, aliases=names[1:], revision=revision, version=version
        )
        self.closed = False
        site.hosts.setdefault(version, []).append(self)

    async def start(self, path: Path) -> None:
        content = (path / "model.gguf").read_text()
        while content == "slow":
            await asyncio.sleep(0.005)
        if content.startswith("broken"):
            raise CheckpointError(f"{path}: {content}.")
        self.model.text = TextProcessor(self.tokenizer, TEMPLATE)
        self.model.digest = f"sha256:{self.model.version}"
        self.client.loaded, self.client.state = True, EngineState.READY

    async def close(self) -> None:
        await self.client.close()
        self.closed = True


@dataclass
class Site:
    """A folder of versions and the app in front of them."""

    folder: Path
    options: ServerOptions = ServerOptions(model_poll_interval=0.01, shutdown_timeout=0.3)
    hosts: dict[int, list[Host]] = field(default_factory=dict)
    verdict: Callable[[Question], Verdict] = lambda question: Verdict()
    dead: list[HeadraceError] = field(default_factory=list)

    def put(self, number: int, content: str = "good") -> None:
        staged = self.folder / f".{number}"
        staged.mkdir(parents=True)
        (staged / "model.gguf").write_text(content)
        staged.rename(self.folder / str(number))

    def remove(self, number: int) -> None:
        shutil.rmtree(self.folder / str(number))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[httpx.AsyncClient]:
        table = ModelTable(expected=("m", "alias"))
        self.metrics = Metrics("m")
        app = create_app(table, ApiConfig(), self.metrics)
        self.services = app.state.services
        events = HostEvents(on_record=self.services.ledger.close, on_dead=self.dead.append)
        config = EngineConfig(model=str(self.folder))
        folder = version_folder(config, self.options)
        assert folder is not None

        async def fits(question: Question) -> Verdict:
            return self.verdict(question)

        self.models = VersionedModels(
            folder,
            config,
            self.options,
            ("m", "alias"),
            events,
            table=table,
            metrics=self.metrics,
            open_requests=self.services.open_requests,
            make_host=lambda config, options, names, events, **more: Host(  # type: ignore[arg-type,return-value]
                self, names, events, **more
            ),
            fits=fits,
        )
        transport = httpx.ASGITransport(app=app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                yield http
        finally:
            await self.models.close()

    def metric(self, name: str, **labels: str) -> float:
        labels = {"model_name": "m", **labels}
        return self.metrics.registry.get_sample_value(f"headrace_{name}", labels) or 0.0


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "m")


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def cards(http: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}


async def says(http: httpx.AsyncClient, model: str | None = "m") -> str:
    body = {"model": model, "prompt": "a", "max_tokens": 40}
    answer = await http.post(COMPLETIONS, json=body)
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    return str(answer.json()["choices"][0]["text"])


def served(site: Site, number: int) -> Callable[[], bool]:
    return lambda: site.metric("model_version") == number


async def test_a_new_version_takes_the_name_and_the_old_one_ends(site: Site) -> None:
    site.put(1)
    async with site.running() as http:
        assert (await http.get("/readyz")).status_code == 503
        assert (await says(http)).startswith("503") and (await says(http, "m@1")).startswith("404")
        await site.models.start()
        assert (await http.get("/readyz")).status_code == 200
        assert await says(http) == await says(http, None) == "I am version 1."
        site.put(2)
        await until(served(site, 2))
        assert await says(http, "alias") == await says(http, "m@2") == "I am version 2."
        await until(lambda: site.hosts[1][0].closed)
        assert (await says(http, "m@1")).startswith("404")
        found = await cards(http)
        assert list(found) == ["m", "alias", "m@2"]
        card = found["m"]
        assert (card["version"], card["revision"], card["state"]) == (2, "2", "ready")
        assert card["digest"] == "sha256:2"
        assert site.metric("model_loads_total", outcome="ok") == 2
    assert site.hosts[2][0].closed


async def test_whoever_holds_the_old_version_finishes_on_it(site: Site) -> None:
    site.put(1)
    async with site.running() as http:
        await site.models.start()
        old = site.hosts[1][0]
        # One has looked the model up and submitted nothing; another one runs.
        held = site.services.open_requests.begin()
        old.client.hold = True
        running = asyncio.create_task(says(http))
        await until(lambda: old.client.num_live)
        site.put(2)
        await until(served(site, 2))
        assert await says(http) == "I am version 2."
        assert (await cards(http))["m@1"]["state"] == "draining"
        old.client.hold = False
        assert await running == "I am version 1."
        await asyncio.sleep(0.1)
        assert not old.closed
        site.services.open_requests.end(held)
        await until(lambda: old.closed)


async def test_what_goes_on_after_its_answer_finishes_on_the_old_version(site: Site) -> None:
    site.put(1)
    async with site.running():
        await site.models.start()
        old = site.hosts[1][0]
        old.client.hold = True
        stream = old.client.submit(
            GenerateRequest(
                request_id="background",
                prompt_token_ids=[65],
                sampling=SamplingParams(max_tokens=4),
                arrival_time=0.0,
            )
        )
        site.put(2)
        await until(served(site, 2))
        await asyncio.sleep(0.1)
        assert not old.closed
        old.client.hold = False
        assert sum([len(output.token_ids) async for output in stream]) == 4
        await until(lambda: old.closed)


async def test_a_broken_version_is_told_once_and_tried_again_when_it_changes(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "headrace.hosting")
    site.put(1)
    async with site.running() as http:
        await site.models.start()
        site.put(2, "broken weights")
        await until(lambda: site.metric("model_loads_total", outcome="failed"))
        await asyncio.sleep(0.1)
        assert await says(http) == "I am version 1."
        card = (await cards(http))["m@2"]
        assert (card["state"], "broken weights" in card["reason"]) == ("failed", True)
        assert (await http.get("/v1/models/m@2")).json()["state"] == "failed"
        assert (await http.get("/readyz")).status_code == 200
        assert len(site.hosts[2]) == 1 and site.hosts[2][0].closed
        assert [record.message.count("broken weights") for record in caplog.records] == [1]
        (site.folder / "2" / "model.gguf").write_text("good again")
        await until(served(site, 2))
        assert "m@1" not in await cards(http) or (await cards(http))["m@1"]["state"] == "draining"


async def test_files_that_cannot_be_read_start_no_engine(site: Site) -> None:
    site.put(1)
    async with site.running() as http:
        await site.models.start()
        site.verdict = lambda question: Verdict(error="cut short")
        site.put(2)
        await until(lambda: site.metric("model_loads_total", outcome="failed"))
        assert 2 not in site.hosts
        assert (await cards(http))["m@2"]["reason"] == "cut short"


async def test_removing_a_version_goes_back_to_the_one_before(site: Site) -> None:
    site.put(1)
    site.put(2)
    async with site.running() as http:
        await site.models.start()
        assert list(site.hosts) == [2]
        site.remove(2)
        await until(served(site, 1))
        assert await says(http) == "I am version 1."
        site.remove(1)
        await asyncio.sleep(0.1)
        assert await says(http) == "I am version 1.", "there is nothing else"


async def test_without_room_requests_are_told_to_come_back(site: Site) -> None:
    site.put(1)
    async with site.running() as http:
        await site.models.start()
        old = site.hosts[1][0]
        site.verdict = lambda question: Verdict(no_room="too large.")
        old.client.hold = True
        running = asyncio.create_task(says(http))
        await until(lambda: old.client.num_live)
        assert b'engine_ready{model_name="m"} 1.0' in site.metrics.render()
        site.put(2, "slow")
        await until(served(site, 0))
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/livez")).status_code == 200
        answer = await http.post(COMPLETIONS, json={"model": "m", "prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert b'engine_ready{model_name="m"} 0.0' in site.metrics.render()
        old.client.hold = False
        assert await running == "I am version 1."
        await until(lambda: old.closed and 2 in site.hosts)
        assert (await says(http)).startswith("503")
        site.remove(2)
        await until(served(site, 1))
        assert await says(http) == "I am version 1.", "the way back"
        assert site.hosts[2][0].closed


async def test_what_does_not_end_in_time_is_ended_where_there_is_no_room(site: Site) -> None:
    site.put(1)
    async with site.running() as http:
        await site.models.start()
        site.hosts[1][0].client.hold = True
        running = asyncio.create_task(says(http))
        await until(lambda: site.hosts[1][0].client.num_live)
        site.verdict = lambda question: Verdict(no_room="too large.")
        site.put(2)
        await until(served(site, 2))
        assert (await running).startswith("503")


async def test_all_versions_have_names_and_make_no_room_for_each_other(site: Site) -> None:
    site.options = ServerOptions(model_poll_interval=0.01, model_versions="all")
    for number in (1, 2):
        site.put(number)
    async with site.running() as http:
        await site.models.start()
        await until(lambda: len(site.services.models) == 2)
        assert await says(http) == await says(http, "m@2") == "I am version 2."
        assert await says(http, "m@1") == "I am version 1."
        assert list(await cards(http)) == ["m", "alias", "m@2", "m@1"]
        site.verdict = lambda question: Verdict(no_room="too large.")
        site.put(3)
        await until(lambda: site.metric("model_loads_total", outcome="failed"))
        assert "--kv-cache-memory-bytes" in (await cards(http))["m@3"]["reason"]
        assert await says(http) == "I am version 2."
        site.remove(2)
        await until(served(site, 1))
        assert (await says(http, "m@2")).startswith("404")


async def test_an_engine_that_is_lost_gives_its_place_to_the_version_before(site: Site) -> None:
    site.put(1)
    site.put(2)
    async with site.running() as http:
        await site.models.start()
        lost = site.hosts[2][0]
        lost.client.state = EngineState.DEAD
        lost.events.on_dead(EngineError("it died 4 times"))
        await until(served(site, 1))
        assert await says(http) == "I am version 1."
        await until(lambda: lost.closed)
        assert (await cards(http))["m@2"]["reason"] == "it died 4 times"
        assert lost.closed and not site.dead
        site.hosts[1][0].events.on_dead(EngineError("this one, too"))
        assert [error.message for error in site.dead] == ["this one, too"]


async def test_a_start_tries_older_versions_and_fails_with_the_last_error(site: Site) -> None:
    site.put(1)
    site.put(2, "broken two")
    async with site.running():
        await site.models.start()
        assert served(site, 1)()
    site.remove(1)
    site.put(1, "broken one")
    async with site.running() as http:
        with pytest.raises(CheckpointError, match="broken one"):
            await site.models.start()
        assert (await http.get("/readyz")).status_code == 503


async def test_a_folder_that_cannot_be_read_changes_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.put(1)
    async with site.running() as http:
        await site.models.start()
        site.folder.rename(site.folder.with_name("elsewhere"))
        await until(lambda: "cannot be read" in caplog.text)
        await asyncio.sleep(0.05)
        assert await says(http) == "I am version 1."
        assert caplog.text.count("cannot be read") == 1
        site.folder.with_name("elsewhere").rename(site.folder)
        site.put(2)
        await until(served(site, 2))


async def test_engine_counters_go_on_across_a_switch(site: Site) -> None:
    site.put(1)
    async with site.running():
        await site.models.start()

        def steps(version: int, count: int) -> None:
            client = site.hosts[version][0].client
            client.stats = type(client.stats)(steps=count)
            site.metrics.render()

        steps(1, 10)
        site.put(2)
        await until(served(site, 2))
        steps(2, 30)
        assert site.metric("engine_steps_total") == 40


async def test_a_server_that_ends_ends_what_it_loads(site: Site) -> None:
    site.put(1)
    async with site.running():
        await site.models.start()
        site.put(2, "slow")
        await until(lambda: 2 in site.hosts)
    assert site.hosts[1][0].closed and site.hosts[2][0].closed


async def test_an_engine_that_is_lost_while_it_drains_is_not_taken_back(site: Site) -> None:
    site.put(1)
    async with site.running() as http:
        await site.models.start()
        held = site.services.open_requests.begin()
        site.put(2)
        await until(served(site, 2))
        first = site.hosts[1][0]
        first.client.state = EngineState.DEAD
        first.events.on_dead(EngineError("gone"))
        site.remove(2)
        await asyncio.sleep(0.05)
        assert await says(http) == "I am version 2.", "until the other one is loaded again"
        site.services.open_requests.end(held)
        await until(served(site, 1))
        assert len(site.hosts[1]) == 2 and first.closed
