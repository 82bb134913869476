"""The page at / in a browser: Chromium of the system, by Playwright, where both are installed."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from server_tools import SAMPLES
from settings import LIGHTVLM

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
KEY = "sesame"
CHAT = "**/v1/chat/completions"
PATIENCE = 15_000  # milliseconds
# Gives the page a file, as an event of this kind has it
GIVE = """([kind, data]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), files = new DataTransfer();
    files.items.add(new File([bytes], "digits.png", { type: "image/png" }));
    const place = kind === "drop" ? document.getElementById("drop") : document;
    const options = { bubbles: true, cancelable: true };
    place.dispatchEvent(kind === "drop"
        ? new DragEvent(kind, { ...options, dataTransfer: files })
        : new ClipboardEvent(kind, { ...options, clipboardData: files }));
}"""
PAINTED = """() => {
    const canvas = document.getElementById("overlay");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.filter((value, n) => n % 4 === 3 && value > 0).length / (data.length / 4);
}"""


@dataclass
class Opened:
    """A page of a server, what it complained of, and whom it asked."""

    page: Any
    url: str
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("request", self._asked)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith("data:"):
            self.hosts.add(urlsplit(request.url).netloc)

    def ask(self, question: str = "Read the top row.") -> dict[str, Any]:
        """The body of the request."""
        self.page.fill("#question", question)
        with self.page.expect_request(CHAT) as sent:
            self.page.click("#send")
        found: dict[str, Any] = json.loads(sent.value.post_data)
        return found

    def answered(self) -> str:
        self.page.wait_for_selector("#told:not([hidden])")
        self.page.wait_for_selector("#send:not([disabled])")
        found: str = self.page.inner_text("#answer")
        return found

    def set_ratio(self, name: str, percent: int) -> None:
        self.page.locator(name).fill(str(percent))


@pytest.fixture(scope="module")
def url(bundle: Callable[..., Path]) -> Iterator[str]:
    """A server that asks for a key, on a port that it tells."""
    folder = bundle("digits-llava", *LIGHTVLM, max_images=2)
    command = [sys.executable, "-m", "lvlm", "serve", f"tiny={folder}", "--port", "0"]
    server = subprocess.Popen([*command, "--api-key", KEY], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = server.stderr.readline()
        place = re.search(r"http://\S+", said)
        assert place is not None, said
        yield place[0]
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as found:
        opened = found.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Opened]:
    """The page, with its key."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.set_default_timeout(PATIENCE)
    found = Opened(page, url)
    page.goto(url)
    page.wait_for_selector("#access:not([hidden])")
    assert page.inner_text("#mistake") == "This server asks for a key."
    page.fill("#key", "mellon")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#mistake")).to_have_text("The server does not know this key.")
    page.fill("#key", KEY)
    page.click("#access button")
    page.wait_for_selector("#model option", state="attached")
    assert page.is_hidden("#mistake")
    assert len(found.complaints) == 2  # of the browser, about 401
    assert all("401" in text for text in found.complaints)
    found.complaints.clear()
    yield found
    assert found.complaints == []
    assert found.hosts == {urlsplit(url).netloc}
    page.close()


def test_an_image_is_asked_about(opened: Opened) -> None:
    page = opened.page
    assert page.inner_text("#model option") == "tiny (lightvlm)"
    assert [page.inner_text(f"label:has({name}) output") for name in ("#keep", "#kv")] == [
        *("35 %", "50 %")
    ]
    page.set_input_files("#file", SAMPLES[0])
    page.wait_for_selector("#image:visible")
    sent = opened.ask()
    assert not {"keep", "kv_keep"} & sent.keys()
    image, text = sent["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == SAMPLES[0].read_bytes()
    assert text["text"] == "Read the top row."
    assert opened.answered()
    assert (
        page.evaluate("document.getElementById('answer').childNodes.length") > 2
    )  # piece by piece
    assert page.get_attribute("#overlay", "data-drawn") == "144"
    assert 0.3 < page.evaluate(PAINTED) < 1
    told = page.locator("#legend li").all_inner_texts()
    counts = [int(line.split()[0]) for line in told]
    assert [line.split()[2] for line in told] == ["kept", "merged", "dropped"]
    assert sum(counts) == 144
    figures = page.locator("#figures tr").all_inner_texts()
    assert figures[3].split("\t") == ["Image tokens", "144 encoded, 50 in the last layer"]
    assert page.locator("#bars rect").count() == 12
    heights = page.eval_on_selector_all(
        "#bars rect", "all => all.map((r) => r.height.baseVal.value)"
    )
    assert heights[0] > heights[5] > 0
    page.click("#show")  # without its patches
    assert page.evaluate(PAINTED) == 0
    page.set_viewport_size({"width": 390, "height": 800})
    page.click("#show")
    assert page.evaluate(PAINTED) > 0.3
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    before = counts[2]
    opened.set_ratio("#keep", 10)
    opened.set_ratio("#kv", 40)
    assert page.inner_text("label:has(#keep) output") == "10 %"
    sent = opened.ask()
    assert (sent["keep"], sent["kv_keep"]) == (0.1, 0.4)
    opened.answered()
    assert int(page.locator("#legend li").last.inner_text().split()[0]) > before
    page.click("#clear")
    assert page.is_hidden("#frame")
    assert page.is_hidden("#legend")
    assert len(opened.ask("Hello")["messages"][0]["content"]) == 1
    opened.answered()


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_comes_by_other_ways(opened: Opened, kind: str) -> None:
    data = base64.b64encode(SAMPLES[1].read_bytes()).decode()
    opened.page.evaluate(GIVE, [kind, data])
    opened.page.wait_for_selector("#image:visible")
    assert opened.page.get_attribute("#image", "src") == f"data:image/png;base64,{data}"


def test_an_answer_is_stopped(opened: Opened) -> None:
    """One that would go on: here the page's request is changed on its way."""
    page = opened.page

    def longer(route: Any) -> None:
        body = json.loads(route.request.post_data) | {"ignore_eos": True, "max_tokens": 1500}
        route.continue_(post_data=json.dumps(body))

    page.route(CHAT, longer)
    page.fill("#question", "Why?")
    page.press("#question", "Enter")
    playwright.expect(page.locator("#answer")).to_have_text(re.compile(r"\S+(\s+\S+){3}"))
    assert page.is_disabled("#send")
    assert page.get_attribute("#answer", "aria-busy") == "true"
    page.click("#stop")
    page.wait_for_selector("#send:not([disabled])")
    assert page.inner_text("#status") == "Stopped."
    assert page.is_hidden("#told")
    page.unroute(CHAT)
    opened.ask("Hello")
    opened.answered()
    assert page.inner_text("#status") != "Stopped."


def test_a_mistake_is_told(opened: Opened) -> None:
    page = opened.page
    page.route(CHAT, lambda route: route.continue_(post_data='{"messages": []}'))
    page.fill("#question", "Why?")
    page.click("#send")
    page.wait_for_selector("#mistake:not([hidden])")
    assert "message" in page.inner_text("#mistake")
    assert page.is_enabled("#send")
    assert any("400" in text for text in opened.complaints)
    opened.complaints.clear()


def test_the_list_of_what_is_served(opened: Opened) -> None:
    assert opened.page.is_hidden("#api")  # a link sends no key
    opened.page.set_extra_http_headers({"Authorization": f"Bearer {KEY}"})
    opened.page.goto(f"{opened.url}/docs")
    opened.page.wait_for_selector("h2")
    assert "POST /v1/chat/completions" in opened.page.locator("h2").all_inner_texts()
