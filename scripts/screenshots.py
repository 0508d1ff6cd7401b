"""Pictures of the page, for the README and the docs: real jobs, and a headless Chromium.

usage: python -m scripts.screenshots
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from selenium.webdriver.support.ui import WebDriverWait

from tests.page.site import Site, chromium, site, until

FOLDER = Path(__file__).parents[1] / "docs" / "images"
LLM, VISION, SPEECH = "llm-7b", "vision-moe", "speech-large"


def main() -> int:
    """Train three jobs, and look at them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gradwatch-shots-") as name, site(Path(name)) as it:
        print("a job that is rolled back", flush=True)
        it.heal(LLM, seed=3)
        print("a job with a broken operator", flush=True)
        it.break_operator(VISION, step=24)
        print("a job that goes on with a bad rank", flush=True)
        it.go_on(SPEECH, bad_step=300, ranks=4)
        until(lambda: it.ask(f"/api/v1/incidents?job={SPEECH}&status=open"), seconds=180)
        shots(it)
    return 0


def shots(it: Site) -> None:
    """One after the other."""
    (broken,) = it.ask(f"/api/v1/incidents?job={VISION}")
    incident, job = f"#/incidents/{broken['id']}", f"#/jobs/{LLM}"
    for name, path, look in (
        ("fleet", "#/", {}),
        ("job", job, {}),
        ("incident", incident, {}),
        ("incident-dark", incident, {"dark": True}),
        ("phone", f"#/jobs/{SPEECH}", {"phone": True}),
    ):
        with chromium(**look) as browser:
            browser.get(f"{it.url}/{path}")
            WebDriverWait(browser, 30).until(shown)
            fit(browser, phone="phone" in look)
            file = FOLDER / f"{name}.png"
            browser.save_screenshot(str(file))
            print(f"{file.name}: {file.stat().st_size >> 10} KiB", flush=True)


def shown(browser: Any) -> bool:
    """Whether the view is there, and says that it is live."""
    return bool(
        browser.execute_script(
            "return document.getElementById('connection').textContent === 'live'"
            " && document.querySelector('main section').children.length > 0"
        )
    )


def fit(browser: Any, *, phone: bool) -> None:
    """Make the window as high as the page, within reason."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    if phone:
        size = {"width": 390, "height": min(height, 1700), "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    else:
        browser.set_window_size(1200, min(height + 140, 1200))


if __name__ == "__main__":
    sys.exit(main())
