"""What the page says when it is refused, when nobody answers, and to somebody who may only look."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from gradwatch.collector.app import running
from tests.cli.command import gradwatch
from tests.collector.client import one_bad_rank, sidecar
from tests.collector.running import config
from tests.page.site import chromium, site, until
from tests.page.test_page import click, find, go, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.e2e

# The page's own button, for a job that has somewhere to go back to.
BUTTON = """
const done = arguments[0];
import("/assets/dialog.js").then(({ rollbackButton }) => {
  const job = { job: "j", status: "running", policy: {}, last_good_checkpoint: { path: "/c/40", step: 40 } };
  document.getElementById("main").append(rollbackButton(job));
  done();
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as it:
        yield it


def posted(browser: Any) -> list[str]:
    """Where orders have been sent since this was last asked."""
    said = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [one["params"]["request"] for one in said if one["method"] == "Network.requestWillBeSent"]
    return [one["url"] for one in requests if one["method"] == "POST"]


def test_a_viewer_is_told_so_and_a_viewers_token_orders_nothing(tmp_path: Path, browser: Any):
    file = tmp_path / "identities.yaml"
    flags = ["--name", "eve", "--role", "viewer", "--file", file]
    token = gradwatch("token", "new", *flags).stdout.strip()
    with site(tmp_path, "--identities", str(file)) as closed:
        shown = {"headers": {"Authorization": f"Bearer {token}"}}
        browser.execute_cdp_cmd("Network.enable", {})
        browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", shown)
        try:
            go(browser, closed.url)
            find(browser, "h2", "Jobs")
            browser.execute_async_script(BUTTON)
            click(browser, "button.danger")
            assert "You are eve as viewer: only an operator may do this." in read(browser, "dialog")
            click(browser, "dialog button.danger")
            assert posted(browser) == [], "without an operator's token there is nothing to send"
            find(browser, "#token").send_keys(token)
            click(browser, "dialog button.danger")
            until(lambda: "operator" in read(browser, "dialog .answer.bad"))
            assert posted(browser) == [f"{closed.url}/api/v1/jobs/j/rollback"]
            click(browser, "dialog button", "Cancel")
        finally:
            browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})


def test_an_order_that_nobody_answers_is_not_said_to_be_taken(tmp_path: Path, browser: Any):
    with site(tmp_path) as short:
        go(browser, short.url)
        find(browser, "h2", "Jobs")
        browser.execute_async_script(BUTTON)
        click(browser, "button.danger")
        find(browser, "#operator").send_keys("somebody")
    click(browser, "dialog button.danger")
    until(lambda: "whether the order was taken is not known" in read(browser, "dialog .answer"))
    click(browser, "dialog button", "Cancel")
    until(lambda: not browser.find_elements("css selector", "dialog"))
    click(browser, "button.danger")
    assert "Nothing was ordered: no answer from the collector." in read(browser, "dialog")


def test_a_job_that_is_not_known_yet_is_shown_once_it_is(tmp_path: Path, browser: Any):
    async def look() -> None:
        async with running(config(tmp_path)) as info, sidecar(info.grpc) as agent:
            await asyncio.to_thread(early, info.http)
            await agent.send(one_bad_rank())
            await asyncio.to_thread(find, browser, "dl.facts div", "ranks watched")
            alert = browser.find_element("css selector", "#main > [role=alert]")
            assert not alert.is_displayed()

    def early(url: str) -> None:
        go(browser, f"{url}/#/jobs/j")
        assert "no job 'j' has reported here" in read(browser, "#main > [role=alert]")
        assert browser.find_element("id", "connection").text == "live"

    asyncio.run(asyncio.wait_for(look(), 120))
