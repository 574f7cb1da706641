"""The run page in a real Firefox: opened from disk, by keyboard and pointer, hostile text, dark,
narrow, a live run. Nothing may be said in its console."""

from __future__ import annotations

import io
import json
import threading

import pytest
from firefox import BROWSER, Firefox
from pages import HOSTILE, line, made, row, table
from PIL import Image

from reasonrl.report import serve, write


@pytest.fixture(scope="module")
def browser(require, tmp_path_factory):
    require("firefox", None if BROWSER else "no firefox or firefox-esr here")
    with Firefox(tmp_path_factory.mktemp("profile")) as fox:
        yield fox


@pytest.fixture
def fox(browser):
    """The browser at a desk's size; the test fails on any word of the page in the console."""
    browser("WebDriver:SetWindowRect", width=1280, height=900)
    browser.dark(False)
    browser.inside("Services.console.reset()")
    yield browser
    browser.goto("about:blank")
    assert browser.console() == []


@pytest.fixture
def run(tmp_path):
    return made(tmp_path / "run")


def opened(fox, run, view="credit"):
    fox.goto("about:blank")  # the same page with another view would not be loaded again
    fox.goto(f"{write([run], run / 'page.html').as_uri()}#view={view}")
    return fox


def tip(fox) -> str:
    return fox.js("return document.getElementById('tip').innerText")


def test_the_console_is_heard(browser):
    """A page that breaks its own policy and one that throws are both reported."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    browser.goto(f"data:text/html,{policy}<script>1</script>")
    assert "Content-Security-Policy" in " ".join(browser.console())
    browser.goto("data:text/html,<script>nobody.knows</script>")
    assert "nobody is not defined" in " ".join(browser.console())


def test_curves_and_credit_by_keyboard(fox, run):
    line(run, 4, reward_se=0.125)
    opened(fox, run, view="curves")
    assert fox("WebDriver:GetTitle")["value"] == "run · reasonrl"
    names = fox.js("return [...document.querySelectorAll('.chart h2')].map(h => h.firstChild.data)")
    assert names[0] == "reward" and "seconds of a step by phase" in names
    fox.press("Tab", "Tab", "Enter")  # Step credit
    fox.until("!document.getElementById('credit').hidden")
    fox.press("ArrowLeft")
    assert fox.js("return document.getElementById('step').value") == "2"
    fox.js("document.querySelector('#prompts [tabindex=\"0\"]').focus()")
    fox.press("ArrowDown")
    assert fox.texts("#group h2") == ["prompt 1"]
    fox.js("document.querySelector('.card .text').focus()")
    fox.press("ArrowRight", "ArrowRight")
    assert "step 2" in tip(fox) and "step reward: 0.25" in tip(fox)
    fox.press("Escape")
    fox.js("document.querySelector('[data-view=curves]').click()")
    fox.js("document.getElementById('smooth').focus()")
    fox.press(*["ArrowLeft"] * 4)
    fox.js("document.querySelector('.chart svg').focus()")
    fox.press("End", "ArrowLeft", "ArrowRight")
    assert "0.4 ± 0.245" in tip(fox)


def test_the_token_under_the_pointer(fox, run):
    opened(fox, run)
    script = "return document.querySelectorAll('.card .part')[1].getBoundingClientRect().toJSON()"
    box = fox.js(script)
    fox.point(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    fox.until("!document.getElementById('tip').hidden")
    assert tip(fox).splitlines() == [
        "step 2",
        "step reward: 0.25",
        "advantage of its tokens: -1",
        "1 token: log-prob -2, ratio 1.4, clipped",
        "token 3: log-prob -2, ratio 1.4, clipped",
    ]


def test_steps_have_colours_on_the_screen(fox, run):
    opened(fox, run)
    box = fox.js("return document.querySelector('.card .text').getBoundingClientRect().toJSON()")
    scale = fox.js("return devicePixelRatio")
    area = [box["left"], box["top"], box["right"], box["bottom"]]
    shown = (
        Image.open(io.BytesIO(fox.picture())).convert("RGB").crop([scale * edge for edge in area])
    )
    pixels = shown.getcolors(1 << 20)
    assert sum(n for n, (r, g, b) in pixels if b > r + 40) > 50  # rewarded
    assert sum(n for n, (r, g, b) in pixels if r > b + 40) > 50  # not


def test_hostile_text_is_only_text(fox, run):
    bad = {"prompt": HOSTILE, "answer": HOSTILE, "problem_id": HOSTILE, "reward_reason": HOSTILE}
    texts = [HOSTILE, "x" * 1_000_000, "\u202eabc\x00\x1b[2J\u2028", "__proto__"]
    table(run, 3, [row(3, 0, 0, t, reward=None, outcome=None, **bad) for t in texts])
    line(run, 4, **{HOSTILE: 1.0, "__proto__": 1.0})
    opened(fox, run)
    assert fox("WebDriver:GetTitle")["value"] == "run · reasonrl"
    assert len(fox.texts(".card")) == 4 and fox.texts("img") == []
    assert HOSTILE in fox.texts(".card .text")[0]
    opened(fox, run, view="curves")
    assert HOSTILE in fox.texts("#charts")[0] and len(fox.texts("script")) == 2


PAPER = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)"


def test_dark_and_narrow(fox, run):
    table(run, 3, [row(3, 0, k, "a long word;" * 40 + "w" * 300, steps=[[0, 12]]) for k in (0, 1)])
    opened(fox, run)
    fox.until(f"{PAPER} > 600")
    fox.dark(True)
    opened(fox, run)
    fox.until(f"{PAPER} < 200")
    fox("WebDriver:SetWindowRect", width=450, height=844)
    for view in ("credit", "curves"):
        opened(fox, run, view=view)
        wide, room = fox.js("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= room <= 500


def test_a_live_run_is_followed(fox, run):
    server = serve([run], 0, every=0.1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        fox.goto(f"http://127.0.0.1:{server.server_address[1]}/#view=credit")
        assert fox.js("return document.getElementById('step').value") == "3"
        line(run, 4)
        table(run, 4, [row(4, n, k) for n in range(3) for k in range(4)])
        fox.until("document.getElementById('step').value === '4'")
        with (run / "evals.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "eval/accuracy": 0.5}) + "\n")
        fox.js("document.querySelector('[data-view=curves]').click()")
        fox.until("document.getElementById('charts').textContent.includes('eval/accuracy')")
    finally:
        fox.goto("about:blank")  # it asks no more
        server.shutdown()
        server.server_close()
