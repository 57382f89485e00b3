"""A small WebDriver client (https://www.w3.org/TR/webdriver2/) for chromedriver, without dependencies."""

import base64
import json
import re
import subprocess
import time
import urllib.error
import urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER, ESCAPE, TAB, SHIFT, CONTROL = "\ue007", "\ue00c", "\ue004", "\ue008", "\ue009"
HOME, END, LEFT, RIGHT = "\ue011", "\ue010", "\ue012", "\ue014"
WAIT_S = 30


class Browser:
    """Context manager: one headless Chromium, driven by a chromedriver of its own."""

    def __init__(self, chromium, chromedriver, log):
        self.chromium, self.chromedriver, self.log = chromium, chromedriver, log

    def __enter__(self):
        self.output = open(self.log, "w+")
        self.driver = subprocess.Popen([self.chromedriver, "--port=0"], stdout=self.output, stderr=subprocess.STDOUT)
        started = lambda: re.search(r"started successfully on port (\d+)", open(self.log).read())
        self.base = f"http://127.0.0.1:{wait(started, 'chromedriver has not started').group(1)}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb"]
        options = {"binary": self.chromium, "args": arguments}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            session = self.request("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        except BaseException:
            self.__exit__()
            raise
        self.base += f"/session/{session['sessionId']}"
        return self

    def __exit__(self, *_):
        if "/session/" in self.base:
            try:
                self.request("DELETE", "")
            except OSError:
                pass
        self.driver.terminate()
        self.driver.wait()
        self.output.close()

    def request(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise AssertionError(f"{value['error']}: {value['message'].splitlines()[0]}") from None

    def open(self, url):
        self.request("POST", "/url", {"url": url})

    def url(self):
        return self.request("GET", "/url")

    def js(self, script, *arguments):
        """Runs the body of a function. A promise is awaited."""
        return self.request("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, css):
        return self.request("POST", "/element", {"using": "css selector", "value": css})

    def click(self, css):
        self.request("POST", f"/element/{self.find(css)[ELEMENT]}/click", {})

    def type(self, css, text):
        """Types into an element, after what is in it."""
        self.request("POST", f"/element/{self.find(css)[ELEMENT]}/value", {"text": text})

    def text(self, css):
        """The text of the first match, as displayed."""
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def count(self, css):
        return self.js("return document.querySelectorAll(arguments[0]).length", css)

    def is_visible(self, css):
        return self.js("return document.querySelector(arguments[0])?.checkVisibility() ?? false", css)

    def keys(self, *keys, hold=None):
        """Presses keys, one after the other, at the element that has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        if hold:
            actions = [{"type": "keyDown", "value": hold}, *actions, {"type": "keyUp", "value": hold}]
        self.request("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def focused(self):
        """The element that has the focus: its id, or its tag and class."""
        return self.js("const e = document.activeElement; return e.id || `${e.tagName.toLowerCase()}.${e.className}`")

    def wait(self, script, problem, *arguments):
        """Waits until the script returns a true value, and returns that."""
        return wait(lambda: self.js(script, *arguments), problem)

    def cdp(self, command, **parameters):
        return self.request("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screen(self, width, height, dark=False, scale=1):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path):
        """Saves what is in view, as WebP."""
        path.write_bytes(base64.b64decode(self.cdp("Page.captureScreenshot", format="webp", quality=75)["data"]))

    def console(self):
        """Messages of the console since the last call: errors, and violations of the Content-Security-Policy."""
        return [entry["message"] for entry in self.request("POST", "/se/log", {"type": "browser"})]


def wait(condition, problem, seconds=WAIT_S):
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(problem)
        time.sleep(0.05)
    return value
