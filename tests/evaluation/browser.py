"""A page in headless Chromium, driven over its DevTools pipe: no package beside the standard library is needed.

The protocol: https://chromedevtools.github.io/devtools-protocol/. Messages are JSON, each ended by a zero byte.
"""

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import signal
import time

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_TIMEOUT = 60


class Browser:
    """A Chromium process with one page.

    Attributes:
        errors: What the page wrote to the console as an error or a warning, and its uncaught exceptions.
        requests: Addresses that it asked for, those of data: left out.
    """

    def __init__(self, profile: pathlib.Path):
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._received = b""
        self._answers: dict[int, dict] = {}
        self._events: list[str] = []
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads from 3 and writes to 4; copies above both, so that neither is overwritten by the other.
        copies = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_read, to_write)]
        command = [
            EXECUTABLE, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        silent = os.open(os.devnull, os.O_WRONLY)
        self._process = os.posix_spawn(
            EXECUTABLE,
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, copies[0], 3),
                (os.POSIX_SPAWN_DUP2, copies[1], 4),
                (os.POSIX_SPAWN_DUP2, silent, 1),
                (os.POSIX_SPAWN_DUP2, silent, 2),
            ],
            setpgroup=0,
        )
        for end in (to_read, to_write, silent, *copies):
            os.close(end)
        (page,) = [
            each for each in self._send("Target.getTargets", session=None)["targetInfos"] if each["type"] == "page"
        ]
        self._session = None
        attached = self._send("Target.attachToTarget", targetId=page["targetId"], flatten=True, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def close(self):
        with contextlib.suppress(OSError, EOFError):
            self._send("Browser.close", session=None)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)

    def open(self, path: pathlib.Path, width=1280, height=900, dark=False, scale=1, media=""):
        """Opens a file and waits until it is loaded; forgets what earlier pages logged."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                   mobile=width < 600)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._send("Emulation.setEmulatedMedia", media=media, features=features)
        for address in ("about:blank", path.absolute().as_uri()):
            self._events.clear()
            self.errors.clear()
            self.requests.clear()
            self._send("Page.navigate", url=address)
            self._wait(lambda: "Page.loadEventFired" in self._events)

    def run(self, script: str):
        """Value of a JavaScript expression; a promise is awaited."""
        answer = self._send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, script: str):
        """Waits until a JavaScript expression is true."""
        self._wait(lambda: self.run(script))

    def click(self, selector: str):
        """Clicks with the mouse in the middle of an element, where it must be what is hit."""
        quoted = json.dumps(selector)
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({quoted}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str):
        """Presses a key, such as Tab, Enter, Escape, ArrowRight or " "."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, " ": 32,
                 "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip
        text = {"Enter": "\r", " ": " "}.get(key)
        values = {"key": key, "code": key.replace(" ", "Space"), "windowsVirtualKeyCode": codes[key]}
        self._send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **values,
                   **({"text": text} if text else {}))  # fmt: skip
        self._send("Input.dispatchKeyEvent", type="keyUp", **values)

    def screenshot(self, path: pathlib.Path, whole=True):
        """Writes a PNG file of the page, or of what is in view."""
        image = self._send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(image["data"]))

    def _send(self, method, session="", **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._number
        self._wait(lambda: number in self._answers)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _wait(self, is_done):
        end = time.monotonic() + _TIMEOUT
        while not is_done():
            if time.monotonic() > end:
                raise TimeoutError(f"Chromium did not answer for {_TIMEOUT} s.")
            if select.select([self._read], [], [], 0.05)[0]:
                received = os.read(self._read, 1 << 20)
                if not received:
                    raise EOFError("Chromium has ended.")
                *messages, self._received = (self._received + received).split(b"\0")
                for message in map(json.loads, messages):
                    self._take(message)

    def _take(self, message):
        if "id" in message:
            self._answers[message["id"]] = message
            return
        name, values = message["method"], message["params"]
        self._events.append(name)
        if name == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(values["args"]))
        elif name == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(values["entry"]))
        elif name == "Network.requestWillBeSent" and not values["request"]["url"].startswith("data:"):
            self.requests.append(values["request"]["url"])
