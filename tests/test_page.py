"""The live page in a headless Chromium: what it shows, the chat box, and that it asks nobody else."""

from __future__ import annotations

import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.serving import MODEL, Running, engine_of, running

from kvbits.models import LoadedModel

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright

    # The system's browser where there is one; else the one that playwright has installed.
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            if found is None:
                pytest.skip(f"there is no Chromium: {str(error).splitlines()[0]}")
            raise
        yield opened
        opened.close()


@pytest.fixture
def server(byte_loaded: LoadedModel) -> Iterator[Running]:
    with running(engine_of(byte_loaded, kv_cache_memory=16 << 20, max_num_seqs=6)) as found:
        yield found


class Watched:
    """A page of its own, and everything that it asked for or complained about."""

    def __init__(self, browser: Any, url: str) -> None:
        self.hosts: set[str] = set()
        self.trouble: list[str] = []
        self.page = browser.new_page(viewport={"width": 1240, "height": 860})
        self.page.on("request", lambda request: self.hosts.add(urllib.parse.urlsplit(request.url).netloc))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", lambda line: self.trouble.append(line.text) if line.type == "error" else None)
        self.page.goto(url)

    def text(self, place: str) -> str:
        return str(self.page.inner_text(place))


def ask(url: str, number: int) -> None:
    body = {
        "model": MODEL, "prompt": f"Chapter {number % 2}: " + "the sea and the ship went on. " * 12, "max_tokens": 500,
        "ignore_eos": True, "seed": number,
    }  # fmt: skip
    httpx.post(url + "/v1/completions", json=body, timeout=120).raise_for_status()


def test_the_page_shows_the_pool_and_the_sessions_and_chats(
    server: Running, browser: Any, request: pytest.FixtureRequest
) -> None:
    watched = Watched(browser, server.url)
    page = watched.page
    page.wait_for_function("document.getElementById('legend').textContent.includes('free')", timeout=10_000)
    assert MODEL in watched.text("#model")
    frames = server.engine.pool.num_frames
    assert f"free {frames:,}" in watched.text("#legend").replace("\n", " ")
    threads = [threading.Thread(target=ask, args=(server.url, number)) for number in range(6)]
    for thread in threads:
        thread.start()
    page.wait_for_function("document.querySelectorAll('#sessions tr').length >= 4", timeout=30_000)
    page.wait_for_function("!/sealed 0(?!\\d)/.test(document.getElementById('legend').innerText)", timeout=30_000)
    drawn = page.evaluate(
        "() => { const c = document.getElementById('map'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height)"
        ".data, seen = new Set(); for (let i = 0; i < d.length; i += 4) seen.add(`${d[i]},${d[i+1]},${d[i+2]}`);"
        " return [...seen]; }"
    )
    # Free and sealed pages, at the least, in colours of their own.
    assert "52,120,212" in drawn
    assert len(drawn) >= 3
    page.fill("#text", "Write one sentence about the sea.")
    page.click("#send")
    page.wait_for_selector(".assistant", timeout=30_000)
    target = request.config.getoption("--page-screenshot")
    if target is not None:
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(target)))
    page.wait_for_function("document.getElementById('speed').textContent.includes('tokens in')", timeout=60_000)
    assert re.search(r"the first after [\d.]+ s, then [\d.,]+ a second", watched.text("#speed"))
    assert watched.text(".user") == "Write one sentence about the sea."
    assert page.locator("#curves svg").count() == 5
    # Samples of several seconds: a path with lines in it.
    assert "L" in str(page.locator("#curves path").first.get_attribute("d"))
    assert page.locator("#key").is_hidden()
    for thread in threads:
        thread.join(120)
    page.wait_for_function("/cached [1-9]/.test(document.getElementById('legend').innerText)", timeout=10_000)
    page.wait_for_function("document.querySelectorAll('#sessions tr').length == 0", timeout=10_000)
    assert watched.hosts == {server.url.removeprefix("http://")}
    assert not watched.trouble
    server.idle()
    page.close()


def test_several_lines_code_and_stop(server: Running, browser: Any) -> None:
    watched = Watched(browser, server.url)
    page = watched.page
    page.wait_for_function("model !== null", timeout=10_000)
    page.evaluate("show(say('assistant', ''), 'Use `x` so:\\n```python\\nfor i in y:\\n    <b>\\n```\\nDone.')")
    assert page.locator("pre code").inner_text() == "for i in y:\n    <b>"
    assert page.locator(".said > code").inner_text() == "x"
    assert "monospace" in page.evaluate("getComputedStyle(document.querySelector('pre code')).fontFamily")
    page.focus("#text")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('send').textContent == 'Stop'", timeout=10_000)
    page.wait_for_function("[...document.querySelectorAll('.assistant')].at(-1).textContent != ''", timeout=30_000)
    page.click("#send")
    page.wait_for_function("document.getElementById('send').textContent == 'Send'", timeout=10_000)
    assert watched.text("#speed") == "stopped"
    assert page.evaluate("chat.map(m => m.role)") == ["user", "assistant"]
    assert page.evaluate("chat[0].content") == "one\ntwo"
    server.idle()
    # What fails is an error beside the chat, and no part of it.
    page.fill("#text", "x " * 3000)
    page.keyboard.press("Enter")
    page.wait_for_selector(".error", timeout=10_000)
    assert "context" in watched.text(".error")
    assert page.evaluate("chat.length") == 2
    page.close()


def test_a_phone_shows_the_chat_first_and_a_server_that_ends_leaves_old_figures(
    byte_loaded: LoadedModel, browser: Any
) -> None:
    with running(engine_of(byte_loaded)) as server:
        watched = Watched(browser, server.url)
        page = watched.page
        page.wait_for_function("document.getElementById('legend').textContent.includes('free')", timeout=10_000)
        page.set_viewport_size({"width": 390, "height": 844})
        tops = page.evaluate(
            "[...document.querySelectorAll('section')].map(s => [s.getBoundingClientRect().top, s.id])"
        )
        assert min(tops)[1] == "chat"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        server.service.worker.draining = True
        page.wait_for_function(
            "document.getElementById('trouble').textContent.includes('shutting down')", timeout=10_000
        )
        assert not page.evaluate("document.body.classList.contains('stale')")
    page.wait_for_function("document.body.classList.contains('stale')", timeout=10_000)
    assert re.search(r"cannot be reached; figures are of \d", watched.text("#trouble"))
    page.close()


def test_the_page_says_what_is_wrong(byte_loaded: LoadedModel, browser: Any) -> None:
    with running(engine_of(byte_loaded), api_keys=("secret",)) as server:
        watched = Watched(browser, server.url)
        watched.page.wait_for_function("document.getElementById('trouble').textContent != ''", timeout=10_000)
        watched.page.fill("#key", "secret")
        watched.page.wait_for_function("document.getElementById('legend').textContent.includes('free')", timeout=10_000)
        watched.page.wait_for_function("document.getElementById('trouble').textContent == ''", timeout=10_000)
        # A model's or a user's text is text on the page, whatever it looks like.
        watched.page.fill("#text", "<img src=x onerror=document.title='owned'>")
        watched.page.click("#send")
        watched.page.wait_for_selector(".assistant", timeout=30_000)
        assert watched.page.title() == "kvbits"
        assert watched.text(".user") == "<img src=x onerror=document.title='owned'>"
        watched.page.close()
