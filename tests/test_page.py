"""The run page in a real Chromium: keys, colours, tips, search, narrow and dark, a live run.

Every page here must leave the console empty and ask for nothing but its own server.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from pages import HOSTILE, line, made, row, table

from reasonrl.report import serve, write

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

BROWSER = next(
    (b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None
)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture
def run(tmp_path) -> Path:
    return made(tmp_path / "run")


@pytest.fixture(scope="module")
def chromium(require):
    require("browser", None if BROWSER and sync_playwright else "no Chromium, or no playwright")
    assert sync_playwright is not None
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, request):
    """A page that fails the test on any word in the console, error, dialog or foreign request."""
    options = getattr(request, "param", {"viewport": DESK})
    context = chromium.new_context(**options)
    context.set_default_timeout(30_000)
    page, said = context.new_page(), []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("dialog", lambda d: (said.append(d.message), d.dismiss()))
    own = ("file://", "data:", "about:", "http://127.0.0.1:")
    page.on("request", lambda r: None if r.url.startswith(own) else said.append(r.url))
    page.said = said
    yield page
    context.close()
    assert said == []


def opened(tab, *runs, view="credit"):
    tab.goto(write(runs, runs[0] / "page.html").as_uri())
    if view != "curves":
        tab.click(f"[data-view={view}]")
    return tab


def until(tab, what: str) -> None:
    """Wait for a condition of the page; its policy lets no string be run in it, so ask."""
    for _ in range(600):
        if tab.evaluate(what):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never true: {what}")


def tip(tab) -> str:
    return tab.inner_text("#tip")


def backgrounds(tab):
    return tab.eval_on_selector_all(
        ".card:first-child .part", "es => es.map(e => e.style.background)"
    )


def test_the_keyboard_alone_goes_everywhere(tab, run):
    opened(tab, run, view="curves")
    for _ in range(2):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # Step credit
    assert tab.is_visible("#credit") and tab.input_value("#step") == "3"
    tab.keyboard.press("ArrowLeft")
    assert tab.input_value("#step") == "2"
    tab.focus("#prompts [tabindex='0']")
    tab.keyboard.press("ArrowDown")
    assert tab.inner_text("#group h2") == "prompt 1"
    assert tab.evaluate("document.activeElement.textContent").startswith("prompt 1")
    tab.keyboard.press("End")
    assert tab.inner_text("#group h2") == "prompt 2"
    tab.focus(".card .text")
    tab.keyboard.press("ArrowRight")
    assert "step 1" in tip(tab)
    tab.keyboard.press("ArrowRight")
    assert "step 2" in tip(tab) and "step reward: 0.25" in tip(tab)
    assert tab.input_value("#step") == "2"  # the arrows moved inside the completion only
    tab.keyboard.press("Escape")
    assert tab.is_hidden("#tip")
    tab.click("[data-view=curves]")
    tab.focus("#charts svg")
    tab.keyboard.press("ArrowLeft")
    assert tip(tab).startswith("step 2\nrun: 0.15")


def test_colours_follow_reward_or_advantage_and_flags_name_disagreement(tab, run):
    opened(tab, run)
    by_reward = backgrounds(tab)
    tab.click("[data-by=advantage]")
    by_advantage = backgrounds(tab)
    assert by_reward[0].startswith("rgba(31, 119, 208") and by_reward[1].startswith("rgba(224, 112")
    assert by_reward != by_advantage and "0.6" in by_advantage[1]  # -1 is the group's largest
    flags = tab.locator(".flag").all_text_contents()
    assert flags.count("right, with a step marked wrong") == 2
    assert flags.count("wrong, with every step marked right") == 1
    assert tab.locator(".badge.good").count() == 2 and tab.locator(".badge.bad").count() == 2


def test_hovering_a_token_shows_its_log_prob_ratio_and_clipping(tab, run):
    opened(tab, run)
    part = tab.locator(".card .part").nth(1)
    box = part.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    assert tip(tab).splitlines() == [
        "step 2",
        "step reward: 0.25",
        "advantage of its tokens: -1",
        "1 token: log-prob -2, ratio 1.4, clipped",
        "token 3: log-prob -2, ratio 1.4, clipped",
    ]
    box = tab.locator(".card .part").nth(0).bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    assert tip(tab).endswith("token 2: log-prob -1, ratio 1, not clipped")
    assert "2 tokens: log-prob -0.75, ratio 1, 0 of 2 clipped" in tip(tab)


def test_search_filter_sort_and_the_same_prompt_elsewhere(tab, run):
    rows = [row(3, n, k, f"say{n};", steps=[[0, 5]]) for n in range(3) for k in range(n, 3)]
    table(run, 3, rows)
    opened(tab, run)
    names = "#prompts .prompt"
    tab.fill("#search", "SAY2")
    assert tab.locator(names).count() == 1
    tab.fill("#search", "nowhere")
    assert tab.inner_text("#prompts") == "Nothing matches."
    tab.fill("#search", "")
    tab.select_option("#filter", "mixed")
    assert tab.locator(names).count() == 2  # prompt 2 has one completion
    tab.select_option("#filter", "")
    tab.select_option("#sort", "reward")
    assert tab.locator(names).first.text_content().startswith("prompt 1")
    tab.locator(names).last.click()
    tab.click("[data-to='1']")
    assert tab.input_value("#step") == "1" and tab.inner_text("#group h2") == "prompt 2"


def test_hostile_text_is_only_text(tab, run):
    bad = {"prompt": HOSTILE, "answer": HOSTILE, "problem_id": HOSTILE, "reward_reason": HOSTILE}
    texts = [HOSTILE, "x" * 1_000_000, "\u202eabc\x00\x1b[2J\u2028", "__proto__"]
    table(run, 3, [row(3, 0, 0, t, reward=None, outcome=None, **bad) for t in texts])
    line(run, 4, **{HOSTILE: 1.0, "__proto__": 1.0})
    opened(tab, run)
    assert tab.title() == "run · reasonrl" and tab.locator(".card").count() == 4
    assert HOSTILE in tab.text_content(".card .text") and tab.locator("img").count() == 0
    tab.locator(".card .part").first.hover()
    tab.click("[data-view=config]")
    tab.click("[data-view=curves]")
    assert HOSTILE in tab.text_content("#charts")


CURVES = """reward eval/accuracy kl entropy completions/mean_length process/gamma
process/thinking_weight clip_ratio/region_mean completions/clipped_ratio rows/live""".split()


def test_the_curves_that_matter_come_first_with_their_intervals(tab, run):
    with (run / "evals.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "eval/accuracy": 0.5, "eval/accuracy_se": 0.1}) + "\n")
    line(run, 4, **{name: 0.25 for name in CURVES if "eval/" not in name}, reward_se=0.125)
    opened(tab, run, view="curves")
    read = "[...document.querySelectorAll('.chart h2')].map((h) => h.firstChild.textContent)"
    heads = tab.evaluate(read)
    assert heads[: len(CURVES)] == CURVES and "seconds of a step by phase" in heads
    tab.locator("#smooth").fill("1")
    for name, said in (("reward", "0.25 ± 0.245"), ("eval/accuracy", "0.5 ± 0.196")):
        tab.locator(".chart svg").nth(heads.index(name)).focus()
        tab.keyboard.press("End")
        assert said in tip(tab)
        assert tab.locator(".chart").nth(heads.index(name)).locator("path[opacity]").count() == 1


def test_runs_side_by_side_with_the_split_of_time(tab, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    opened(tab, run, other, view="curves")
    assert tab.inner_text("#legend") == "run\nother" or tab.inner_text("#legend") == "runother"
    assert tab.locator("[data-split]").count() == 2
    tab.locator("[data-split] svg").first.hover()
    assert "rollout: 2 s, 67 %" in tip(tab)
    tab.fill("#metric", "reward")
    assert tab.locator(".chart").count() == 1
    tab.click("[data-view=credit]")
    tab.select_option("#run", "1")
    assert tab.locator(".card").count() == 4


@pytest.mark.parametrize(
    "tab",
    [
        {"viewport": PHONE, "is_mobile": True, "has_touch": True},
        {"viewport": PHONE, "color_scheme": "dark"},
        {"viewport": DESK, "color_scheme": "dark"},
    ],
    indirect=True,
)
def test_narrow_and_dark(tab, run):
    long = "word" * 300
    table(run, 3, [row(3, 0, k, long, prompt=long, steps=[[0, 1200]]) for k in range(3)])
    for view in ("curves", "credit", "config"):
        opened(tab, run, view=view)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    style = "getComputedStyle(document.body)"
    ink, paper = tab.evaluate(f"[{style}.color, {style}.backgroundColor]")
    assert (paper == "rgb(20, 24, 30)") == dark and ink != paper
    tab.click("#theme")
    assert (tab.evaluate(f"{style}.backgroundColor") == "rgb(20, 24, 30)") != dark


def test_ten_thousand_completions_are_drawn_as_they_come_near(tab, run):
    table(run, 3, [row(3, n, k) for n in range(1250) for k in range(8)])
    opened(tab, run)
    assert tab.inner_text("#count") == "1250 prompts, 10000 completions"
    assert tab.locator(".prompt").count() <= 400
    tab.focus("#prompts [tabindex='0']")
    tab.keyboard.press("End")
    assert tab.inner_text("#group h2") == "prompt 1249"
    table(run, 3, [row(3, 0, k) for k in range(10_000)])
    opened(tab, run)
    assert tab.locator(".card").count() < 200
    for _ in range(3):
        tab.evaluate("scrollTo(0, document.body.scrollHeight)")
        tab.wait_for_timeout(50)
    assert tab.locator(".card").count() > 24


def test_a_live_run_is_followed_and_the_focus_kept(tab, run):
    server = serve([run], 0, every=0.1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tab.goto(f"http://127.0.0.1:{server.server_address[1]}/#view=credit")
        assert tab.input_value("#step") == "3"
        tab.focus("#prompts [tabindex='0']")
        tab.keyboard.press("ArrowDown")
        line(run, 4)
        table(run, 4, [row(4, n, k) for n in range(3) for k in range(4)])
        until(tab, "$('step').value === '4'")
        assert tab.inner_text("#group h2") == "prompt 1"  # the same prompt, of the new step
        assert tab.evaluate("document.activeElement.textContent").startswith("prompt 1")
        tab.keyboard.press("ArrowLeft")  # who looks at an older step stays there
        table(run, 5, [row(5, 0, 0)])
        until(tab, "$('step').options.length === 5")
        assert tab.input_value("#step") == "3"
        assert tab.locator(".card").count() == 4
        aside = run.rename(run.with_name("gone"))  # between two runs
        until(tab, "$('notes').textContent.includes('no such')")
        tab.said[:] = [s for s in tab.said if "503" not in s]
        for step in (4, 5):
            (aside / f"completions/completions_{step:05d}.parquet").unlink()
        aside.rename(run)
        until(tab, "$('step').options.length === 3")
        assert tab.inner_text("#notes") == "" and tab.input_value("#step") == "3"
        tab.wait_for_timeout(300)
        tab.said[:] = [s for s in tab.said if "503" not in s]  # the browser's own line
    finally:
        tab.goto("about:blank")  # it asks no more
        server.shutdown()
        server.server_close()
