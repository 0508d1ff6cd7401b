"""The page in a real browser, over real jobs: from the fleet to the verdict, by mouse and by keyboard."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from gradwatch.cli.launcher import collector_state
from gradwatch.collector.app import running
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import batch, hello, nonfinite, progress, sidecar
from tests.collector.running import config
from tests.page.site import Site, chromium, site, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.e2e
LIVE, BROKEN = "llm-7b", "vision-moe"


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A job whose operator broke, which has ended, and one with a bad rank that goes on."""
    with site(tmp_path_factory.mktemp("page")) as made:
        made.break_operator(BROKEN, step=20)
        made.go_on(LIVE, bad_step=60)
        until(lambda: made.ask(f"/api/v1/incidents?job={LIVE}&status=confirmed"))
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as it:
        yield it


def find(browser: Any, selector: str, text: str = "") -> WebElement:
    """The first element of a kind that is shown and has a text in it."""

    def look() -> WebElement | None:
        found = browser.find_elements(By.CSS_SELECTOR, selector)
        return next((one for one in found if one.is_displayed() and text in one.text), None)

    return until(lambda: fresh(look), seconds=30)


def read(browser: Any, selector: str, text: str = "") -> str:
    """What an element says, though a live page makes it anew while one reads."""
    return str(until(lambda: fresh(lambda: find(browser, selector, text).text), seconds=30))


def texts(browser: Any, selector: str) -> list[str]:
    """What all the elements of a kind say, once there are some."""

    def look() -> list[str]:
        return [one.text for one in browser.find_elements(By.CSS_SELECTOR, selector)]

    return list(until(lambda: fresh(look), seconds=30))


def click(browser: Any, selector: str, text: str = "") -> None:
    """Click on an element, though a live page makes it anew while one aims."""
    until(lambda: fresh(lambda: find(browser, selector, text).click() is None), seconds=30)


def fresh(look: Callable[[], Any]) -> Any:
    """What a look gives; none if what it looked at was replaced meanwhile."""
    with contextlib.suppress(StaleElementReferenceException):
        return look()
    return None


def go(browser: Any, url: str) -> None:
    # Another hash alone is no navigation.
    browser.get("about:blank")
    browser.get(url)


def section(browser: Any, heading: str) -> str:
    """What is said below a heading."""

    def look() -> str:
        return str(find(browser, "h2", heading).find_element(By.XPATH, "..").text)

    return str(until(lambda: fresh(look)))


def test_an_incident_is_followed_from_the_fleet_to_its_verdict(it: Site, browser: Any):
    go(browser, it.url)
    assert "step 60" in read(browser, "article.open")
    click(browser, "article.open a")
    verdict = read(browser, ".verdict")
    (incident,) = it.ask(f"/api/v1/incidents?job={LIVE}")
    assert incident["verdict"][0] in verdict
    assert "Rank 1 on node" in verdict
    assert browser.title == f"Incident {incident['id']}"
    steps = texts(browser, ".chain li")
    assert "was not finite before the model saw it" in steps[0]
    assert "turned nan on rank 1" in steps[1]
    assert "met the finite gradients of rank 0" in steps[2]
    table = section(browser, "Parameters where clean turns into bad")
    assert incident["first"]["parameter"] in table
    assert "4 of 4 parameters were bad" in table
    assert "dry run" in section(browser, "What was decided about it")
    assert incident["decisions"][0]["id"] in section(browser, "What was decided and done")
    click(browser, "section a", LIVE)
    assert find(browser, "h1", LIVE)
    assert find(browser, "a.incident")


def test_the_chain_begins_with_the_operator_where_it_is_known(it: Site, browser: Any):
    (incident,) = it.ask(f"/api/v1/incidents?job={BROKEN}")
    go(browser, f"{it.url}/#/incidents/{incident['id']}")
    steps = texts(browser, ".chain li")
    assert "aten.log" in steps[0]
    assert "broken.py" in steps[0]
    assert "blocks" in steps[1]
    assert "turned" in steps[2]
    where = section(browser, "Where it began")
    assert incident["first"]["replay"]["code"] in where
    assert "What went into it." in where
    assert len(browser.find_elements(By.CSS_SELECTOR, ".chart svg")) >= 4
    boundary = it.ask(f"/api/v1/incidents/{incident['id']}/boundary")
    assert boundary["rank"] == 1
    assert [one["backward_position"] for one in boundary["parameters"] if one["state"] == "bad"][:2] == [0, 1]


def test_the_keyboard_is_enough(it: Site, browser: Any):
    go(browser, it.url)
    find(browser, "article.open a")
    for _ in range(6):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if "step 60" in browser.switch_to.active_element.text:
            break
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    find(browser, ".verdict")
    assert browser.switch_to.active_element.tag_name == "h1", "whoever cannot see is told of the new view"
    go(browser, f"{it.url}/#/jobs/{LIVE}")
    canvas = find(browser, "canvas[tabindex]")
    until(lambda: int(canvas.get_attribute("width")) > 30)
    canvas.send_keys(Keys.HOME, Keys.ARROW_DOWN)
    said = read(browser, ".readout")
    assert said.startswith("rank 1 on ")
    assert "clean" in said
    canvas.send_keys(Keys.END)
    assert "not finite" in until(
        lambda: "not finite" in (text := browser.find_element(By.CSS_SELECTOR, ".readout").text) and text
    )


def test_it_is_live_and_nothing_is_loaded_from_elsewhere(it: Site, browser: Any):
    go(browser, f"{it.url}/#/jobs/{LIVE}")
    before = read(browser, "dl.facts div", "step")
    until(lambda: read(browser, "dl.facts div", "step") != before)
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            assert url.startswith((it.url, "data:", "about:", "chrome:")), url
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def test_an_order_is_asked_for_twice_and_cancelling_sends_nothing(it: Site, browser: Any):
    until(lambda: it.ask(f"/api/v1/jobs/{LIVE}")["last_good_checkpoint"])
    go(browser, f"{it.url}/#/jobs/{LIVE}")
    known = {one["id"] for one in it.ask(f"/api/v1/jobs/{LIVE}")["decisions"]}
    until(lambda: fresh(lambda: find(browser, "button.danger").is_enabled()))
    click(browser, "button.danger")
    dialog = find(browser, "dialog")
    assert "stopped on every host" in dialog.text
    dialog.find_element(By.XPATH, ".//button[text()='Cancel']").click()
    until(lambda: not browser.find_elements(By.CSS_SELECTOR, "dialog"))
    assert {one["id"] for one in it.ask(f"/api/v1/jobs/{LIVE}")["decisions"]} == known
    click(browser, "button.danger")
    find(browser, "#operator").send_keys("somebody")
    click(browser, "dialog button.danger")
    answer = until(lambda: (text := read(browser, "dialog .answer")) != "Asking …" and text)
    ordered = [one for one in it.ask(f"/api/v1/jobs/{LIVE}")["decisions"] if one["id"] not in known]
    if ordered:
        assert ordered[0]["id"] in answer
        assert "somebody" in json.dumps(it.ask(f"/api/v1/jobs/{LIVE}/audit"))
    else:
        assert "cannot go back" in answer


@pytest.mark.parametrize("where", ["", "jobs", "incidents"])
def test_a_phone_scrolls_up_and_down_only(it: Site, where: str):
    (incident,) = it.ask(f"/api/v1/incidents?job={BROKEN}")
    path = {"": "#/", "jobs": f"#/jobs/{BROKEN}", "incidents": f"#/incidents/{incident['id']}"}[where]
    with chromium(phone=True) as phone:
        phone.get(f"{it.url}/{path}")
        find(phone, "table")
        widths = phone.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [390, 390]


def test_a_thousand_ranks_are_drawn_and_a_jobs_name_is_only_text(tmp_path: Path, browser: Any):
    name = "<img src=x onerror=alert(1)>"
    ranks = 1024

    async def look() -> tuple[list[int], str, str]:
        async with running(config(tmp_path)) as info, sidecar(info.grpc) as agent:
            for step in (1, 5000, 10_000):
                report = pb.Report()
                for rank in range(ranks):
                    incarnation = f"r{rank}"
                    if step == 1:
                        records = [hello(incarnation, rank, ranks, job=name)]
                        report.batches.append(
                            batch(incarnation, *records, *([nonfinite(1, 1)] if rank == 700 else []))
                        )
                    said = 2 if rank == 700 else 1
                    report.progress.append(
                        progress(incarnation, step, said, bad_rounds=said - 1, magnitude=1.0 + rank)
                    )
                await agent.send(report)
            return await asyncio.to_thread(drawn, info.http)

    def drawn(url: str) -> tuple[list[int], str, str]:
        go(browser, url)
        click(browser, "table a", name)
        canvas = find(browser, "canvas[tabindex]")
        until(lambda: int(canvas.get_attribute("height")) == 256)
        canvas.send_keys(Keys.HOME, *[Keys.ARROW_DOWN] * 175)
        size = [int(canvas.get_attribute("width")), int(canvas.get_attribute("height"))]
        return size, read(browser, ".readout"), read(browser, "h1")

    size, said, title = asyncio.run(asyncio.wait_for(look(), 120))
    assert size[0] <= 240
    assert title == name
    # Four ranks share a line, and the bad one is not lost among them.
    assert "rank 700\N{EN DASH}703" in said
    assert "not finite" in said


def test_a_collector_that_goes_away_is_said(tmp_path: Path, browser: Any):
    with site(tmp_path) as short:
        go(browser, short.url)
        until(lambda: browser.find_element(By.ID, "connection").text == "live")
    assert "no answer from the collector since" in until(
        lambda: "no answer" in (text := browser.find_element(By.ID, "connection").text) and text
    )
    assert collector_state.ready(tmp_path / "state") is None
