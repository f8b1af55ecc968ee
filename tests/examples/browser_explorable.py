"""Open `examples/course/explorable.html` in headless Chromium and use it as a reader does.

`python tests/examples/browser_explorable.py` checks the page. With a DIRECTORY it leaves pictures
there: both languages, both widths, light, dark and grey. Needs Chromium and its chromedriver on the
PATH (in Debian the packages `chromium` and `chromium-driver`).
"""

import argparse
import base64
import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from itertools import product
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).parents[2] / "examples" / "course" / "explorable.html"
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--hide-scrollbars",
]  # fmt: skip
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "tab": "\ue004"}


def missing() -> str:
    """What is not installed, or nothing."""
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium on the PATH"
    return "" if shutil.which("chromedriver") else "no chromedriver on the PATH"


class Browser:
    """Headless Chromium by the WebDriver protocol (W3C): JSON requests to its chromedriver."""

    def __init__(self, profile: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = f"http://127.0.0.1:{port}"
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.session = ""
        try:
            self._wait_for_the_driver()
            self.session = self._start(profile)
        except BaseException:
            self.close()
            raise

    def _wait_for_the_driver(self):
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError):
                return self.call("GET", "/status")
            time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def _start(self, profile: str) -> str:
        binary = next(filter(None, map(shutil.which, BROWSERS)))
        options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        body = {"capabilities": {"alwaysMatch": wanted}}
        return "/session/" + self.call("POST", "/session", body)["sessionId"]

    def close(self):
        with contextlib.suppress(Exception):
            self.call("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait()

    def call(self, method: str, path: str, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def post(self, path: str, **body):
        return self.call("POST", self.session + path, body)

    def js(self, script: str):
        return self.post("/execute/sync", script=f"return {script}", args=[])

    def until(self, condition: str):
        """Wait for what is soon true."""
        for _ in range(100):
            if self.js(condition):
                return
            time.sleep(0.05)
        raise AssertionError(f"not within five seconds: {condition}")

    def devtools(self, command: str, **parameters):
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, width: int, height: int, link: str, scheme: str = "light"):
        phone = width < 500
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=phone)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.devtools("Emulation.setEmulatedMedia", features=features)
        self.visit(f"{PAGE.as_uri()}#{link}")

    def visit(self, address: str):
        self.post("/url", url="about:blank")
        self.post("/url", url=address)

    def press(self, *keys: str):
        """Keys, to what has the focus."""
        downs_and_ups = [
            {"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")
        ]
        self.post("/actions", actions=[{"type": "key", "id": "keys", "actions": downs_and_ups}])

    def pointer(self, *places, kind: str = "mouse"):
        """Press at the first place, move over the others, let go."""
        at = lambda place: {  # noqa: E731
            "type": "pointerMove", "duration": 20, "x": round(place[0]), "y": round(place[1]),
        }  # fmt: skip
        actions = [at(places[0]), {"type": "pointerDown", "button": 0}]
        actions += [*map(at, places[1:]), {"type": "pointerUp", "button": 0}]
        source = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        self.post("/actions", actions=[source | {"actions": actions}])

    def picture(self, path: Path, whole: bool = True):
        """A picture of the page, or of what is in the window."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        png = io.BytesIO(base64.b64decode(shot["data"]))
        Image.open(png).convert("RGB").quantize(128, kmeans=1).save(path, optimize=True)

    def log(self, kind: str) -> list[dict]:
        return self.post("/se/log", type=kind)


@contextlib.contextmanager
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = Browser(profile)
        try:
            yield opened
        finally:
            opened.close()


# --- What a reader does ---------------------------------------------------------------------------

STEP_SHOWN = "Number(document.querySelector('#step-heading .t').textContent)"
GUIDE = "document.getElementById('guide').innerText"
CODE = "document.getElementById('code').textContent"


def middle(page: Browser, element: str) -> tuple[float, float]:
    """The middle of an element in the window, scrolled to."""
    box = page.js(
        f"(() => {{ const e = {element};"
        "e.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    return box[0], box[1]


def by_id(name: str) -> str:
    return f"document.getElementById('{name}')"


def click(page: Browser, element: str):
    """With a mouse: on a busy machine a finger stays too long to make a click of the browser."""
    page.pointer(middle(page, element))


def focus(page: Browser, element: str):
    page.js(f"{element}.focus()")


def drag_the_start(page: Browser, kind: str):
    x, y = middle(page, by_id("start"))
    page.pointer((x, y), (x + 20, y + 10), (x + 60, y + 40), kind=kind)
    box = page.js("document.getElementById('surface').getBoundingClientRect()")
    due = f"[{x + 60 - box['x']}, {y + 40 - box['y']}]"
    page.until(f"each((a, b) => Math.abs(a - b), to_pixel(s.start), {due}).every((d) => d < 2)")
    assert page.js("s.start") == start(page)
    assert page.js("Object.values(runs).every(({ path }) => path[0].point === s.start)")


def start(page: Browser) -> list[float]:
    """Where the start is, as a screen reader says it."""
    text = page.js("document.getElementById('start').getAttribute('aria-valuetext')")
    x, y = text.split(",")
    return [float(x.split()[1]), float(y.split()[1])]


def click_a_step(page: Browser, kind: str):
    """Near a point of the path: the cards show the step whose gradient is taken there."""
    middle(page, by_id("surface"))
    box = page.js("document.getElementById('surface').getBoundingClientRect()")
    x, y = page.js("to_pixel(runs.mine.path[7].point)")
    page.pointer((box["x"] + x, box["y"] + y), kind=kind)
    page.until(f"{STEP_SHOWN} === 8")
    shown = page.js("document.querySelector('#flow li:first-child tbody tr').innerText")
    assert shown.split()[-2:] == page.js("runs.mine.path[7].point.map(number)")
    shown = page.js("document.querySelector('#flow li:last-child tbody tr:last-child').innerText")
    assert shown.split()[-2:] == page.js("runs.mine.path[8].point.map(number)")
    assert page.js("document.querySelectorAll('#now .arrow').length") == 3


def choose(page: Browser, key: str, value: str):
    click(page, f"document.querySelector('[name={key}][value={value}] + .face')")


def height_of(page: Browser, element: str) -> float:
    """Where an element begins, in pixels from the top of the page."""
    return page.js(f"{element}.getBoundingClientRect().y + scrollY")


def use(page: Browser, kind: str):
    """Everything once, with a mouse or a finger."""
    assert page.js("document.documentElement.scrollWidth") == page.js("innerWidth")
    assert page.js("Object.keys(runs)") == ["mine", "sgd"]  # it opens as Adam beside SGD
    assert page.js("is_adam(s) && runs.mine.look") == "mine is-adam"
    assert page.js("document.querySelector('[name=adam]').disabled")
    drag_the_start(page, kind)
    click_a_step(page, kind)
    page.pointer(middle(page, by_id("curves")), kind=kind)
    page.until(f"Math.abs({STEP_SHOWN} - 90) < 5")
    before = page.js(STEP_SHOWN)
    click(page, by_id("forth"))
    page.until(f"{STEP_SHOWN} === {before + 1}")
    click(page, by_id("play"))
    page.until(f"{STEP_SHOWN} > {before + 3}")
    click(page, by_id("play"))
    page.until("playing === undefined")

    # Neither the reasons why something is not offered nor a card that goes moves what is set.
    off = "document.querySelector('[value=off] + .face')"
    middle(page, off)
    seen = [f"{element}.getBoundingClientRect().y" for element in (off, by_id("seed"))]
    before = [page.js(y) for y in seen]
    choose(page, "correction", "off")
    page.until(f"!{CODE}.includes('debias')")
    assert page.js("document.getElementById('why').textContent")
    page.until(f"Math.abs({seen[0]} - {before[0]}) < 1 && Math.abs({seen[1]} - {before[1]}) < 1")
    code = page.js(CODE)
    assert "# =" not in code  # no optimizer of the package is this
    assert page.js("document.querySelector('[value=rectify]').disabled")
    choose(page, "division", "rectify")
    assert page.js(CODE) == code
    choose(page, "correction", "on")
    page.until(f"{CODE}.includes('debias')")
    choose(page, "maximum", "after")
    page.until(f"{CODE}.includes('# = adam_jax.amsgrad')")
    assert page.js("document.querySelectorAll('#flow li').length") == 6
    click(page, "document.querySelector('[name=adam]')")
    page.until("Object.keys(runs).join() === 'mine,adam,sgd'")

    focus(page, by_id("sgd_rate"))
    rows = page.js("document.getElementById('runs').offsetHeight")
    page.press(*["right"] * 20)  # too fast: SGD leaves, and the page says so
    assert "leaves at step" in page.js("document.getElementById('runs').innerText")
    assert page.js("document.getElementById('runs').offsetHeight") == rows

    title = page.js("document.querySelector('h1').innerText")
    click(page, by_id("language"))
    page.until("document.documentElement.lang === 'zh'")
    assert page.js("document.querySelector('h1').innerText") != title
    assert "学习率" in page.js("document.getElementById('sliders').innerText")
    assert page.js("document.documentElement.scrollWidth") == page.js("innerWidth")

    # The address leads back to all of this.
    page.until("location.hash === '#' + write_link(s, 'zh')")
    set_now, address = page.js("s"), page.js("location.href")
    assert set_now["maximum"] == "after"
    page.visit(address)
    assert page.js("s") == set_now
    assert page.js("document.documentElement.lang") == "zh"


def ask(page: Browser):
    """Every question is asked, and answered when the reader wants; neither moves the picture."""
    for question in page.js("Object.keys(QUESTIONS)"):
        click(page, f"document.querySelector('[data-ask={question}]')")
        page.until(f"s.ask === '{question}'")
        top = height_of(page, by_id("surface"))
        button = "document.querySelector('#guide button')"
        closed = page.js(GUIDE)
        assert page.js(f"{button}.getAttribute('aria-expanded')") == "false"
        click(page, button)
        page.until(f"{GUIDE}.length > {len(closed) + 30}")
        assert page.js(GUIDE).startswith(closed.strip())
        assert height_of(page, by_id("surface")) == top, question


def copy(page: Browser):
    """“Copied” goes away."""
    for name, label in (("copy", "Copy"), ("link", "Copy link")):
        text = f"document.getElementById('{name}').textContent"
        click(page, by_id(name))
        page.until(f"{text} === 'Copied'")
        page.until(f"{text} === '{label}'")


# --- Where things are -----------------------------------------------------------------------------

BOX = """((element) => {
  const { left, top, right, bottom } = element.getBoundingClientRect();
  return { left, top, right, bottom };
})"""


def box(page: Browser, selector: str) -> dict:
    return page.js(f"{BOX}(document.querySelector('{selector}'))")


def cards_beside_the_surface(page: Browser):
    """At 1280 × 800 without scrolling, whatever the chain, in both languages."""
    page.open(1280, 800, "en")
    for language, one in product(("en", "zh"), page.js("combinations()")):
        page.js(f"(Object.assign(s, {json.dumps(one)}), speak('{language}'))")
        picture, flow = box(page, ".picture"), box(page, "#flow")
        assert flow["left"] > picture["right"]
        assert flow["top"] == picture["top"]
        assert flow["bottom"] <= 800, one
        assert box(page, ".side")["left"] > flow["right"]
        assert page.js("scrollY") == 0
        fits(page)


def fits(page: Browser):
    """No formula runs into its numbers, no number out of its card."""
    cells = "[...document.querySelectorAll('#flow :is(th, td)')]"
    wide = f"{cells}.filter((one) => one.scrollWidth > one.clientWidth + 1)"
    assert page.js(f"{wide}.map((one) => one.innerText)") == []


def cards_under_the_surface(page: Browser):
    """On a phone: only the buttons of the step and the legend stand between."""
    for language in ("en", "zh"):
        page.open(390, 844, language)
        stepper, signs, flow = (box(page, one) for one in (".stepper", ".signs", "#flow"))
        assert box(page, ".picture")["bottom"] < stepper["top"] < signs["top"] < flow["top"]
        assert flow["top"] - stepper["bottom"] < 80
        assert box(page, "#flow li:nth-child(2)")["bottom"] < 844
        for one in page.js("combinations()"):
            page.js(f"(Object.assign(s, {json.dumps(one)}), render())")
            fits(page)


def extremes(page: Browser):
    """A start in the minimum, where all losses are 0; steps to infinity."""
    for link in ("surface=quadratic&start=0,0", "scale=10000&sgd_rate=1&beside=momentum,sgd"):
        page.open(1280, 800, f"en&{link}")
        drawn = page.js("document.querySelector('.workbench').innerHTML")
        assert not {"NaN", "Infinity", "undefined"} & set(re.findall(r"\w+", drawn)), link


def hidden_at_first(page: Browser):
    """In a frame that is shown later, as on a slide or in a tab, the page draws when it is seen."""
    with tempfile.NamedTemporaryFile("w", suffix=".html") as slide:
        slide.write(f'<iframe src="{PAGE.as_uri()}" style="display: none"></iframe>')
        slide.flush()
        page.visit(Path(slide.name).as_uri())
        page.post("/frame", id=0)
        page.until(
            "document.readyState === 'complete' && document.getElementById('flow').innerText"
        )
        assert page.js("document.getElementById('paths').innerHTML") == ""
        page.post("/frame/parent")
        page.js("(document.querySelector('iframe').style = 'width: 1200px; height: 700px')")
        page.post("/frame", id=0)
        page.until("document.querySelectorAll('#paths .path').length === 2")
        page.until("document.querySelectorAll('#curves .path').length === 8")
        assert page.js("document.getElementById('bands').width") > 200
        page.post("/frame", id=None)


def use_the_keyboard(page: Browser):
    """No mouse: every control is reached with the tabulator and does what its keys say."""
    reached = set()
    for _ in range(60):
        page.press("tab")
        reached.add(page.js("document.activeElement.id || document.activeElement.name"))
    sliders = {"learning_rate", "sgd_rate", "b1", "b2", "eps", "scale", "noise", "seed", "step"}
    beside = {"adagrad", "momentum", "sgd"}
    choices = {"surface", "lookahead", "correction", "maximum", "division", "epsilon"}
    assert (
        reached
        >= {"language", "link", "start", "play", "back", "forth", "copy"}
        | sliders
        | choices
        | beside
    )

    focus(page, by_id("start"))
    (x, y), code = start(page), page.js(CODE)
    page.press("right", "right", "up")
    assert start(page)[0] > x
    assert start(page)[1] > y
    assert page.js(CODE) == code
    for name in sorted(sliders):
        focus(page, by_id(name))
        before = page.js("s")
        page.press("right" if name in ("noise", "seed") else "left")
        after = page.js("s")
        assert [key for key in after if after[key] != before[key]] == [name]
    assert page.js(CODE) != code
    focus(page, "document.querySelector('[name=lookahead]:checked')")
    page.press("right")
    page.until(f"{CODE}.includes('nesterov')")


def check():
    """Everything, on a wide page and on a phone; nothing is complained of or fetched meanwhile."""
    with browser() as page:
        page.post("/url", url="about:blank")
        page.log("performance")  # forget what Chromium's own first page asked for
        page.open(1280, 800, "en")
        use(page, "mouse")
        page.open(390, 844, "en")
        use(page, "touch")
        for language in ("en", "zh"):
            page.open(1280, 800, language)
            ask(page)
        cards_beside_the_surface(page)
        cards_under_the_surface(page)
        extremes(page)
        hidden_at_first(page)
        page.open(1280, 800, "en")
        copy(page)
        page.open(1280, 800, "en", scheme="dark")
        use_the_keyboard(page)
        background = page.js("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, background.strip("rgb()").split(","))) < 64
        corner = (
            "document.getElementById('bands').getContext('2d').getImageData(2, 2, 1, 1).data[0]"
        )
        assert page.js(corner) < 96
        assert page.log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
        asked = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert PAGE.as_uri() in {url.split("#")[0] for url in asked}
        assert all(url.startswith(("file:", "data:", "about:")) for url in asked), asked


def pictures(directory: Path):
    """The whole page in both languages and widths, light and dark; one in grey; the gallery's."""
    with browser() as page:
        for width, height in ((1280, 800), (390, 844)):
            for language, scheme in (
                ("en", "light"),
                ("zh", "dark"),
                ("en", "dark"),
                ("zh", "light"),
            ):
                page.open(width, height, language, scheme)
                page.picture(directory / f"{language}-{width}-{scheme}.png")
        page.open(1280, 800, "en")
        page.picture(directory / "explorable.png", whole=False)
        page.js("(document.documentElement.style.filter = 'grayscale(1)')")
        page.picture(directory / "grey.png", whole=False)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", help="where to leave pictures")
    directory = parser.parse_args().directory
    if missing():
        parser.error(f"the page was not tried: {missing()}")
    if directory and not directory.is_dir():
        parser.error(f"there is no directory {directory}")
    check()
    print("the explorable: used with a mouse, a finger and the keyboard, and measured")
    if directory:
        pictures(directory)


if __name__ == "__main__":
    main()
