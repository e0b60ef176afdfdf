"""Chromium without a window, driven over a pipe by its own protocol."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = "Chromium is not installed: apt-get install chromium"
_LIMIT = 60  # seconds for an answer


class Tab:
    """An open page.

    Attributes:
        events: All that the browser told unasked: console lines, requests, errors.
    """

    def __init__(self, answers, questions):
        self._answers, self._questions = answers, questions
        self._number = 0
        self._session = None
        self.events = []

    def ask(self, method, **parameters):
        self._number += 1
        question = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            question["sessionId"] = self._session
        os.write(self._questions, json.dumps(question).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self):
        text = bytearray()
        while (char := self._answers.read(1)) != b"\0":
            assert char, "the browser is gone"
            text += char
        return json.loads(text)

    def open(self, url):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=url)
        while not any(each.get("method") == "Page.loadEventFired" for each in self.events):
            self.events.append(self._next())

    def show(self, width, scheme):
        """Lay the page out for a screen, "light" or "dark"."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media="screen", features=media)
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def lay_out_for_paper(self, width, scheme):
        """As ``show``, but for paper of this many pixels between its margins."""
        self.show(width, scheme)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media="print", features=media)

    def printed(self):
        """The page as PDF on A4."""
        inches = {"paperWidth": 8.27, "paperHeight": 11.69}
        answer = self.ask("Page.printToPDF", printBackground=False, **inches)
        return base64.b64decode(answer["data"])

    def evaluate(self, expression):
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self):
        """The whole page as PNG."""
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def told(self, method):
        """Parameters of the events of a kind."""
        return [each["params"] for each in self.events if each.get("method") == method]


@contextlib.contextmanager
def opened(path):
    """A file in a new browser that knows no network."""
    inward, questions = os.pipe()
    answers, outward = os.pipe()
    # The protocol's pipe has the numbers 3 and 4 in the browser, whatever they are here.
    shell = 'exec "$@" 3<&%d 4>&%d' % (inward, outward)  # noqa: UP031
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--hide-scrollbars",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", PROGRAM, *options],
            pass_fds=(inward, outward),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inward)
        os.close(outward)
        try:
            with open(answers, "rb") as file:
                tab = Tab(file, questions)
                tab.open(path.resolve().as_uri())
                yield tab
        finally:
            process.kill()
            process.wait(_LIMIT)
            os.close(questions)
