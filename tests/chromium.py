"""A real Chromium for tests, driven over the W3C WebDriver protocol; the fixtures are in conftest.py."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
]
KEYS = {"Escape": "\ue00c", "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015"}
KEYS |= {"Tab": "\ue004", "Enter": "\ue007"}


class Chromium:
    """One browser window, driven over the W3C WebDriver protocol."""

    def __init__(self, port, binary, profile):
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._address = f"http://127.0.0.1:{port}/session"
        options = {"binary": binary, "args": [*CHROMIUM_ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/{session['sessionId']}"

    def call(self, method, path, body=None):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers, method=method)
        try:
            with self._http.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:  # the driver's reason is in the body
            raise RuntimeError(f"{method} {path}: {error.read().decode()}") from error

    def open(self, page):
        """A file, or an address."""
        self.call("POST", "/url", {"url": page if isinstance(page, str) else page.as_uri()})

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def resize(self, width, height=900):
        """The page's own size; a window may not be as narrow as a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme):
        """light or dark."""
        self.devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def devtools(self, command, parameters):
        self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def violations(self):
        """What axe-core objects to; nothing where it is not installed."""
        found = importlib.util.find_spec("axe_playwright_python")
        if found is None:
            assert "REQUIRE_BROWSER" not in os.environ, "pip install --no-deps axe-playwright-python"
            return []
        source = (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")
        script = f"{source}; const done = arguments[0]; axe.run().then((found) => done(found.violations))"
        violations = self.call("POST", "/execute/async", {"script": script, "args": []})
        return [(one["id"], [node["html"][:200] for node in one["nodes"]][:3]) for one in violations]

    def find(self, selector):
        """A reference to the element, as WebDriver passes it."""
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        return next(iter(found.values()))

    def click(self, selector):
        self.call("POST", f"/element/{self.find(selector)}/click")

    def press(self, *keys):
        codes = [KEYS.get(key, key) for key in keys]
        presses = [{"type": kind, "value": code} for code in codes for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": presses}]})

    def role_and_name(self, selector):
        element = self.find(selector)
        return tuple(self.call("GET", f"/element/{element}/computed{what}") for what in ("role", "label"))

    def console(self):
        """What the page has said or failed at since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def requests(self):
        """URLs that were asked for since the last call, `data:` ones left out."""
        entries = self.call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    # what the page shows

    def ids(self):
        return self.run("return [...document.querySelectorAll('#questions .id bdi')].map((id) => id.textContent)")

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def focused(self):
        """Id of the question that has the focus, or of another element."""
        return self.run("const e = document.activeElement; return e.querySelector('.id bdi')?.textContent ?? e.id")

    def choose(self, name, value):
        self.click(f"#{name} option[value='{value}']")

    def show(self, name):
        self.click(f"#filters label:has([value={name}])")

    def search(self, text):
        self.click("#search")
        self.run("document.getElementById('search').select()")
        self.press(*text)


def started(profile: Path) -> Iterator[Chromium]:
    """A window; without Chromium or its driver the test is skipped, unless REQUIRE_BROWSER is set."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "no chromium" if binary is None else "no chromedriver"
        assert "REQUIRE_BROWSER" not in os.environ, missing
        pytest.skip(f"{missing}: install Debian's packages chromium and chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        ports = (re.search(r"started successfully on port (\d+)", line) for line in process.stdout)
        port = next(match for match in ports if match)[1]
        window = Chromium(port, binary, profile)
        window.call("POST", "/url", {"url": "about:blank"})  # the page for a new tab asks for its own parts
        yield window
        window.call("DELETE", "")
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the driver has been seen to survive SIGTERM
        process.wait()
        process.stdout.close()
