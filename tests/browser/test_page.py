"""The page in a real browser: it opens, filters and colours; what a model said does nothing; ten thousand completions open at once.

Needs Chromium and its driver: `apt-get install chromium chromium-driver`, or KEEL_CHROMIUM and KEEL_CHROMEDRIVER name them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from keel.config import RunConfig
from keel.files import append_jsonl
from keel.report.command import report
from keel.report.view import serving
from keel.run_folder import RunFolder

CHROMIUM = (
    os.environ.get("KEEL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = os.environ.get("KEEL_CHROMEDRIVER") or shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--window-size=1300,1000")
NUMBERS = ("logp_rollout", "logp", "entropy", "gap")

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("plotly")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser():
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")  # an alert of a completion's would stay, and be seen
    try:
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    except WebDriverException as fault:
        pytest.skip(f"Chromium does not start on this machine: {str(fault)[:200]}")
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def share(skill: str, value: float) -> dict[str, float]:
    return {f"eval/{skill}pass@1{end}": value + by for end, by in (("", 0.0), ("_low", -0.05), ("_high", 0.05))}


def run_of(path: Path, said, traces=(), **settings) -> Path:
    folder = RunFolder.create(RunConfig(out=str(path), **settings), {})
    rows = [{"step": n, "tokens/total": 500.0 * n, "reward/mean": n / 40, "policy/entropy_nats": 1 - n / 60} for n in range(1, 41)]
    ends = [share("", v) | share("skills:sort/", w) for v, w in ((0.2, 0.8), (0.6, 0.6))]
    append_jsonl(folder.metrics, [{"step": 0} | ends[0], *rows[:-1], rows[-1] | ends[1]])
    folder.rollouts.write_text("".join(json.dumps(row) + "\n" for row in said))
    folder.tokens.write_text("".join(json.dumps(row) + "\n" for row in traces))
    return folder.path


def rollout(n: int, text: str | None = None, **changes):
    step, prompt, sample = 1 + n // 250, n // 8, n % 8
    right = n % 3 == 0
    return {
        "step": step, "prompt_id": f"p{prompt}", "sample": sample, "prompt": f"{prompt}+{prompt}=", "answer": str(2 * prompt),
        "completion": f"A:{2 * prompt + (not right)}" if text is None else text, "reward": float(right), "correct": right,
        "finish": "length" if n % 5 == 0 else "stop", "tokens": 4,
        "said": f"{2 * prompt + (not right)}",
    } | changes  # fmt: skip


def trace_of(row, step: int, texts):
    draw = random.Random(0)
    told = {name: [round(-draw.random(), 3) for _ in texts] for name in NUMBERS}
    return {
        "step": step,
        "prompt_id": row["prompt_id"],
        "sample": row["sample"],
        "tokens": texts,
        "ratio": 1.0,
        "advantage": 0.5,
    } | told


def opened(browser, url: str) -> float:
    """Open a page, wait until it says that it is ready, and tell the seconds that it took."""
    browser.get("about:blank")
    browser.get_log("browser")
    begun = time.monotonic()
    browser.get(url)
    until(browser, "return document.documentElement.dataset.ready")
    return time.monotonic() - begun


def until(browser, script: str, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not (found := browser.execute_script(script)) and time.monotonic() < end:
        time.sleep(0.05)
    assert found, f"never came true: {script}; {browser.get_log('browser')}"
    return found


def js(browser, expression: str):
    return browser.execute_script(f"return {expression}")


def press(browser, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def counts(browser) -> dict[str, int]:
    return {
        each.get_attribute("data-state"): int(each.find_element("tag name", "small").text.replace(",", ""))
        for each in browser.find_elements("css selector", "#states button")
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two runs of a thousand completions, of which some have tokens."""
    root = tmp_path_factory.mktemp("page")
    said = [rollout(n) for n in range(1000)]
    said[16] |= {"reward": None, "unscorable": "the judge was silent"}
    texts = [[*row["completion"], "<end>"] for row in said]
    said = [row | {"tokens": len(text)} for row, text in zip(said, texts, strict=True)]
    traces = [trace_of(row, row["step"], text) for row, text in zip(said[8:24], texts[8:24], strict=True)]
    one = run_of(root / "one", said, traces)
    two = run_of(root / "two", [rollout(n, f"other {n}") for n in range(1000)], seed=1)
    return report([str(one), str(two)], out=str(root / "page.html"))


def test_it_opens_draws_filters_and_colours_without_a_complaint(browser, small):
    opened(browser, small.as_uri())
    assert js(browser, "document.querySelector('h1').textContent").startswith("Held-out pass@1 at the end: one 0.6")
    until(browser, "return document.querySelectorAll('.figure[data-drawn] svg.main-svg').length >= 2")
    assert counts(browser) == {"all": 2000, "right": 668, "wrong": 1331, "cut off": 400, "no verdict": 1}
    press(browser, "u")
    assert (
        until(browser, "return reader.shown.length === 1") and "the judge was silent" in browser.find_element("id", "detail").text
    )
    press(browser, "a")
    press(browser, "j")
    press(browser, "j")
    press(browser, "k")
    assert browser.execute_script("return [reader.at, document.querySelectorAll('.row.chosen').length]") == [1, 1]
    colours = set()
    for _ in range(6):
        press(browser, "c")
        colours.add(js(browser, "[...document.querySelectorAll('.token')].map((t) => t.style.backgroundColor).join()"))
    assert len(colours) >= 4  # five quantities and none; the ratio is 1 and as pale as none
    press(browser, "v")
    assert len(browser.find_elements("css selector", ".cards.two .card")) == 2
    assert {each.text for each in browser.find_elements("css selector", ".card .where")} == {"one", "two"}
    press(browser, "/")
    press(browser, "other 77")
    until(browser, "return reader.shown.length === 11")  # 77 and 770 … 779
    assert browser.find_element("css selector", "#detail mark").text == "other 77"
    assert complaints(browser) == []


def test_the_reader_says_what_was_taken_for_the_answer_and_why(browser, small):
    opened(browser, small.as_uri())
    browser.execute_script("$('order').value = ''; reader.choose(null); reader.view = 'alone'; reader.go(0)")
    told = browser.find_element("css selector", ".why").text.split("\n")
    assert told == ["answer", "0", "verdict", "right: the gold answer"]
    browser.execute_script("reader.go(1)")
    assert browser.find_element("css selector", ".why").text.split("\n") == ["answer", "1", "verdict", "wrong: not the gold answer"]


def test_generalisation_and_forgetting_are_a_table(browser, small):
    opened(browser, small.as_uri())
    table = browser.find_element("id", "skills-table")
    assert [each.text for each in table.find_elements("css selector", "thead th")] == ["skill", "one", "two"]
    assert [each.text.split("\n")[0] for each in table.find_elements("css selector", "tbody th")][1:] == ["skills:sort"]
    cell = table.find_elements("css selector", "tbody tr:nth-child(2) td")[0]
    assert cell.text == "0.800 → 0.600\n−0.200 (−0.271 to −0.129)" and cell.get_attribute("class") == "number bad"


def test_nothing_is_wider_than_a_telephone(browser, small):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened(browser, small.as_uri())
        for view in ("alone", "group", "two"):
            browser.execute_script("reader.view = arguments[0]; reader.detail()", view)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        wide = "[...document.querySelectorAll('.bar *, .tools *')].filter((e) => e.getBoundingClientRect().right > 400).length"
        assert js(browser, wide) == 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_light_and_dark(browser, small):
    opened(browser, small.as_uri())
    grounds = []
    for _ in range(3):
        browser.find_element("id", "theme").click()
        grounds.append(browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor"))
    assert len(set(grounds)) == 2
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    assert browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor") == grounds[1]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    press(browser, "?")
    assert browser.find_element("id", "keys").is_displayed()
    assert complaints(browser) == []


SAID = "document.querySelector('.card .text').textContent"
HOSTILE = {
    "ends the script": "</script><script>window.harmed = 1; alert(1)</script>",
    "an image": "<img src=x onerror='window.harmed = 1'><svg onload='window.harmed = 1'>",
    "a template": "{{ constructor.constructor('window.harmed = 1')() }} ${window.harmed = 1}",
    "a comment": "<!-- <script> --> ]]> <style>* { display: none !important }</style>",
    "a long line": "long " + "x" * 1_000_000,
    "turned around": "\u202eabc\u2066def\u2069 \u200f right to left שלום",
    "nothing": "before\u0000after\u001b[31m red\u0007",
    "half a pair": "lone \ud83d surrogate \ude00 and 🙂 whole",
    "javascript:": "javascript:window.harmed=1 data:text/html,<script>window.harmed=1</script>",
    "lines": "\n" * 3000,
    "an object": "__proto__",
}


def test_hostile_completions_do_nothing(browser, tmp_path):
    names = list(HOSTILE)
    said = [
        rollout(8 * n, HOSTILE[name], prompt=HOSTILE[name], prompt_id=f"{n} {name} {HOSTILE[name][:200]}", answer=HOSTILE[name])
        | {"reason": HOSTILE[name][:500], "said": HOSTILE[name][:400], "parts": {HOSTILE[name][:50]: 1.0}, "tokens": 1}
        for n, name in enumerate(names)
    ]
    traces = [trace_of(row, row["step"], [row["completion"]]) for row in said[:4]]
    opened(browser, report([str(run_of(tmp_path / "</title><b>run", said, traces))]).as_uri())
    scripts = browser.execute_script("return document.scripts.length")
    browser.execute_script("$('order').value = ''; reader.choose(null)")
    for n, name in enumerate(names):
        browser.execute_script("reader.go(arguments[0])", n)
        press(browser, "g")
        assert js(browser, "reader.view") == ("alone" if n % 2 == 0 else "group")
        shown = js(browser, SAID)
        assert shown.startswith(HOSTILE[name][:3]) or name in ("turned around", "lines"), name
    assert js(browser, "window.harmed === undefined && document.querySelectorAll('#reader img, #reader svg').length === 0")
    assert browser.execute_script("return document.scripts.length") <= scripts + 1  # the chart program alone
    browser.execute_script("reader.go(arguments[0])", names.index("turned around"))
    text = js(browser, SAID)
    assert "\u202e" not in text and text.startswith("202Eabc2066def2069")
    browser.execute_script("reader.go(arguments[0])", names.index("half a pair"))
    assert js(browser, SAID) == "lone D83D surrogate DE00 and 🙂 whole"
    press(browser, "/")
    press(browser, "</script>")
    until(browser, "return reader.shown.length === 2")
    assert complaints(browser) == []


def test_the_policy_stops_a_script_that_is_not_ours(browser, small):
    """The second wall: even if markup got into the page, it could neither run nor reach anything."""
    opened(browser, small.as_uri())
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.harmed = 1\">')")
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.harmed = 1'; document.body.append(s)"
    )
    asked = "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('asked'), () => done('refused'))"
    assert browser.execute_async_script(asked) == "refused"
    time.sleep(0.3)
    assert browser.execute_script("return window.harmed") is None
    assert any("Content Security Policy" in told for told in complaints(browser))


def test_ten_thousand_completions_open_in_two_seconds(browser, tmp_path):
    said = [rollout(n, f"{n}: " + "so it goes on, " * 12) for n in range(10_000)]
    traces = [trace_of(row | {"tokens": 40}, row["step"], [row["completion"]] + [""] * 39) for row in said[:400]]
    said = [row | {"tokens": 40} for row in said]
    path = report([str(run_of(tmp_path / "big", said, traces))])
    seconds = 9.9
    for _ in range(8):  # other tests keep the processor busy
        seconds = min(seconds, opened(browser, path.as_uri()))
        if seconds < 2.0:
            break
    assert browser.execute_script("return reader.shown.length") == 10_000
    assert len(browser.find_elements("css selector", ".row")) < 80  # only those that can be seen
    browser.execute_script("document.querySelector('#list').scrollTop = 1e9")
    until(browser, "return !!document.getElementById('row-9999')")
    assert seconds < 2.0
    assert complaints(browser) == []


def test_a_served_page_follows_the_run(browser, tmp_path):
    path = run_of(tmp_path / "run", [rollout(n) for n in range(100)])
    with serving(path) as server:
        opened(browser, server.url)
        until(browser, "return document.querySelectorAll('.figure[data-drawn] svg.main-svg').length >= 2")
        browser.execute_script("reader.go(5)")
        kept = browser.execute_script("return reader.key(reader.shown[reader.at])")
        append_jsonl(path / "rollouts.jsonl", [rollout(n) for n in range(100, 140)])
        for held in server.shelf.held.values():
            held.rests_until = 0.0
        until(browser, "return reader.shown.length === 140")
        assert browser.execute_script("return reader.key(reader.shown[reader.at])") == kept
        browser.get(f"http://127.0.0.1:{server.port}{server.base}")
        assert "run" in browser.find_element("css selector", ".index a").text
        assert complaints(browser) == []
        browser.get("about:blank")
