"""A Chromium without a window, spoken to by its DevTools protocol through pipes: no port, no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60
"""That anything may take, on a busy machine."""

# Chromium reads commands at descriptor 3 and answers at 4.
_LAUNCHER = """
import os, sys
reads, writes = int(sys.argv[1]), int(sys.argv[2])
high = [os.dup2(one, number) for one, number in ((reads, 60), (writes, 61))]
os.dup2(60, 3); os.dup2(61, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with one page."""

    def __init__(self, program: str, folder: Path):
        down, up = os.pipe(), os.pipe()
        flags = [
            *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-extensions", "--disable-background-networking", "--disable-sync", "--mute-audio"),
            f"--user-data-dir={folder}",
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            # Which refuses to put root in its sandbox.
            flags.append("--no-sandbox")
        command = [sys.executable, "-c", _LAUNCHER, str(down[0]), str(up[1]), program, *flags, "about:blank"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(down[0], up[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(down[0])
        os.close(up[1])
        self._commands, self._answers = os.fdopen(down[1], "wb", buffering=0), up[0]
        self._buffer, self._number = b"", 0
        self.events: list[dict] = []
        targets = self._call("Target.getTargets", None)["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self._call("Target.attachToTarget", None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and all of its processes."""
        self._commands.close()
        os.close(self._answers)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def call(self, method: str, **parameters):
        """A command to the page, and its result."""
        return self._call(method, self._session, **parameters)

    def _call(self, method: str, session: str | None, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def _read(self) -> dict:
        import select

        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], SECONDS)
            part = os.read(self._answers, 2**20) if ready else b""
            assert part, "Chromium does not answer"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def open(self, address: str) -> None:
        """Go to an address, and wait until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str):
        """The value of an expression of JavaScript, awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true: it is tried at each frame."""
        limit = 1000 * SECONDS
        waiting = (
            "new Promise((done) => { const from = performance.now(); const look = () => { let found = false; "
            f"try {{ found = ({script}); }} catch {{ }} "
            f"if (found || performance.now() - from > {limit}) done(Boolean(found)); else setTimeout(look, 15); }}; look(); }})"
        )
        assert self.run(waiting), f"never: {script}; the page says {self.run('document.body.innerText')[:2000]!r}"

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False, shift: bool = False) -> None:
        """Press a key by its name, such as Tab or ArrowRight."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
        codes |= {"Home": 36, "End": 35, "a": 65}
        how = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        how["modifiers"] = 2 * ctrl + 8 * shift
        text = {"Enter": "\r", " ": " "}.get(key)
        self.call("Input.dispatchKeyEvent", type="keyDown", **how, **({} if text is None else {"text": text}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def point(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        box = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'center'}}); "
            "const { x, y, width, height } = one.getBoundingClientRect(); return [x + width / 2, y + height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def show_as(self, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Set the size of the window, and whether pages are dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is to be seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """What the page logged as errors: exceptions, broken rules of its security policy, files that are not there."""
        self.run("0")
        kinds: dict[str, Callable[[dict], str | None]] = {
            "Runtime.exceptionThrown": lambda one: str(one["exceptionDetails"]),
            "Log.entryAdded": lambda one: one["entry"]["text"] if one["entry"]["level"] == "error" else None,
        }
        found = (kinds[one["method"]](one["params"]) for one in self.events if one.get("method") in kinds)
        return [one for one in found if one is not None]

    def addresses(self) -> list[str]:
        """Every address that the page asked for."""
        self.run("0")
        return [
            one["params"]["request"]["url"] for one in self.events if one.get("method") == "Network.requestWillBeSent"
        ]
