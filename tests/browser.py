"""A headless Chromium that tests look at pages with, driven by the WebDriver protocol."""

import base64
import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request

FOUND = shutil.which("chromium") and shutil.which("chromedriver")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
QUIET += " --disable-background-networking --disable-component-update --disable-sync"


class Browser:
    """One window."""

    def __init__(self, port: int):
        self.at, self.session = f"http://127.0.0.1:{port}/session", ""
        options = {"args": QUIET.split(), "binary": shutil.which("chromium")}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        found = self.call("", capabilities={"alwaysMatch": always})
        self.session = "/" + found["sessionId"]

    def call(self, path: str, method: str = "POST", **what):
        body = json.dumps(what).encode() if method == "POST" else None
        request = urllib.request.Request(self.at + self.session + path, body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:  # a script's fault, say
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def run(self, script: str, *arguments):
        """What a function's body returns."""
        return self.call("/execute/sync", script=script, args=arguments)

    def command(self, name: str, **what):
        """Of Chromium's own protocol."""
        return self.call("/goog/cdp/execute", cmd=name, params=what)

    def open(self, path, width: int = 1280, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.call("/url", url=path.resolve().as_uri())

    def faults(self) -> list[str]:
        """What the page has complained of since the last call."""
        return [entry["message"] for entry in self.call("/se/log", type="browser")]

    def picture(self, path) -> None:
        path.write_bytes(base64.b64decode(self.call("/screenshot", "GET")))


@contextlib.contextmanager
def browser():
    driver = subprocess.Popen(
        [shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        opened = Browser(int(line.rstrip(".\n").split()[-1]))
        yield opened
        opened.call("", "DELETE")  # else Chromium stays
    finally:
        driver.terminate()
        driver.wait()
