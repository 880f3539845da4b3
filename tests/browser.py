"A browser for tests of pages."

import fcntl
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reloaded(Exception):
    "The page was loaded anew while an expression waited for its value."


class Browser:
    "Chromium without a window; it is told what to do through a pipe, in the DevTools protocol."

    def __init__(self, program, folder):
        wires = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars".split()
        words = [program, *options, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]

        def place():  # Chromium reads from 3 and writes to 4
            os.dup2(wires[0], 3)
            os.dup2(wires[3], 4)

        self._process = subprocess.Popen(
            words, preexec_fn=place, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (wires[0], wires[3]):
            os.close(end)
        self._in, self._out = wires[2], wires[1]
        self._rest, self._number, self._session = b"", 0, {}
        self.said, self._loaded = [], False
        page = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Log", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _listen(self, end):
        "The next message, after what it tells was noted; it must come until a time."
        while b"\0" not in self._rest:
            ready = select.select([self._in], [], [], max(0, end - time.monotonic()))[0]
            assert ready, "Chromium says nothing"
            piece = os.read(self._in, 2**20)
            assert piece, "Chromium is gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(message)
        self._loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") == "Log.entryAdded":
            self.said.append(message["params"]["entry"]["text"])
        return message

    def call(self, method, **params):
        "What a command returns."
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while (answer := self._listen(end)).get("id") != self._number:
            assert time.monotonic() < end
        if "navigated" in answer.get("error", {}).get("message", ""):
            raise Reloaded
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, code):
        "The value of an expression in the page, or what it promises."
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def loading(self, method, **params):
        "A command after which a new page is loaded."
        self._loaded = False
        self.call(method, **params)
        end = time.monotonic() + 60
        while not self._loaded:
            self._listen(end)
            assert time.monotonic() < end

    def open(self, url):
        self.loading("Page.navigate", url=url)

    def choose(self, file):
        "Put a file into the form."
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#video")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def press(self, key, code):
        for kind in ("rawKeyDown", "char", "keyUp") if key == "Enter" else ("rawKeyDown", "keyUp"):
            text = {"text": "\r"} if kind == "char" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def look(self, width, scheme):
        "The size of the window and the colour scheme of its owner."
        size = dict(width=width, height=700, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
