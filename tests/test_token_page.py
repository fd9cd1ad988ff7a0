"""The page of the token view, opened in a headless Chromium."""

import re
from pathlib import Path

import pytest
from helpers import CHROMIUM, make_row
from PIL import Image

from gndpo_trl.token_view.colours import colour
from gndpo_trl.token_view.page import write_page


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install Debian's package `chromium`")

NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--"
NAN = float("nan")


def rows() -> list:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    first = make_row(
        ["The", " answer\n", NASTY, " €", "", " end"],
        [0.0, -1.25, -7.5, 6.0, 0.3, NAN],
        prompt="what is &lt; ? <b>" + NASTY,
        images=[image],
        reward=0.5,
        rewards={"accuracy": 0.5},
    )
    second = make_row(["short"], [2.0], prompt="Find the OWL", reward=2.0, images=[image])
    empty = make_row([], [])
    third = make_row(list("abcdefghij"), [-0.5] * 10, reward=-1.0, images=["https://example.org/x.png"])
    return [first, second, empty, third]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of some rows, and fails if it asks for anything or complains."""
    tabs, asked, complaints = [], [], []

    def open_page(rows, clip: float | None = 5.0):
        path = tmp_path / "page.html"
        write_page(rows, str(path), 7, "train", clip)
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(path.as_uri())
        tabs.append(tab)
        return tab

    yield open_page
    for tab in tabs:
        tab.close()
    assert [url for url in asked if not url.startswith("data:image/png;")] == [(tmp_path / "page.html").as_uri()]
    assert not complaints


def token(tab, place: int):
    return tab.locator("#completion .token").nth(place)


def style(locator, name: str) -> str:
    return locator.evaluate(f"token => getComputedStyle(token).{name}")


def order(tab) -> list[int]:
    return [int(text) for text in tab.locator("#list li b").all_text_contents()]


def test_tokens_have_the_colours_of_their_scores(open_page):
    tab = open_page(rows())
    assert tab.title() == tab.locator("h1").text_content() == "Tokens of step 7, train"
    for place, score in enumerate([0.0, -1.25, -7.5, 6.0, 0.3]):
        assert style(token(tab, place), "backgroundColor") == "rgb({}, {}, {})".format(*colour(score, 5.0))
    assert style(token(tab, 1), "backgroundColor") == "rgb(217, 172, 131)"  # half way from white to orange
    for place, mark in enumerate(["none", "none", "solid", "solid", "none", "none"]):
        assert style(token(tab, place), "borderBottomStyle") == mark, "the clamp"
    assert "outside" in token(tab, 5).get_attribute("class")
    assert style(token(tab, 5), "backgroundColor") == "rgba(0, 0, 0, 0)"
    assert token(tab, 1).text_content() == " answer↵\n" and token(tab, 4).text_content() == "·"
    assert style(token(tab, 2), "color") == "rgb(255, 255, 255)" and style(token(tab, 0), "color") != style(
        token(tab, 2), "color"
    )


def test_without_a_clamp_the_largest_score_has_the_full_colour(open_page):
    tab = open_page([make_row(["a", "b"], [8.0, -2.0], clip=float("inf"))], clip=None)
    assert style(token(tab, 0), "backgroundColor") == "rgb(33, 102, 172)"
    assert style(token(tab, 1), "backgroundColor") == "rgb({}, {}, {})".format(*colour(-2.0, 8.0))
    assert "no clamp" in tab.locator("#legend").text_content()


def test_the_tooltip_tells_what_is_known_of_a_token(open_page):
    tab = open_page(rows())
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    token(tab, 2).hover()
    found = re.sub(" +", " ", tip.text_content())
    for line in ("score -7.500 nats (clamped to −5)", "teacher -8.500 log-prob", "student -1.000 log-prob"):
        assert line in found
    assert "advantage -3.750" in found and "id 2, token 3 of 6" in found
    token(tab, 5).hover()
    found = re.sub(" +", " ", tip.text_content())
    assert "not in the loss" in found and "teacher – log-prob" in found and "advantage 0.000" in found
    tab.locator("h1").hover()
    assert not tip.is_visible()


def test_text_of_the_model_is_never_markup(open_page):
    tab = open_page(rows())
    assert token(tab, 2).text_content() == NASTY
    assert tab.locator("#prompt").text_content() == "what is &lt; ? <b>" + NASTY
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("script").count() == 2 and tab.locator("img").count() == 1


def test_images_are_in_the_page(open_page):
    tab = open_page(rows())
    image = tab.locator("#images img")
    assert image.evaluate("image => [image.complete, image.naturalWidth, image.naturalHeight]") == [True, 40, 20]
    assert len(tab.evaluate("data.images")) == 2  # one of two completions, and one that is a mere address
    for _ in range(3):
        tab.keyboard.press("j")
    assert tab.locator("#images").text_content() == "Image https://example.org/x.png, which this page does not open"


def test_completions_are_sorted_searched_and_walked_through(open_page):
    tab = open_page(rows())
    assert order(tab) == [1, 2, 3, 4]
    for key, expected in {"length": [3, 2, 1, 4], "mean": [4, 1, 2, 3], "reward": [4, 1, 2, 3]}.items():
        tab.select_option("#sort", key)
        assert order(tab) == expected, key
    tab.click("#direction")
    assert order(tab) == [2, 1, 4, 3]  # without a reward: the last either way
    tab.select_option("#sort", "order")
    tab.click("#direction")

    heading = tab.locator("#about")
    assert heading.text_content() == "Completion 1"
    for key, number in (("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("k", 1), ("j", 2)):
        tab.keyboard.press(key)
        assert heading.text_content() == f"Completion {number}", key
    assert tab.locator("#numbers").text_content() == "1 tokens · mean score 2.000 nats · 0 clamped · rank 0"
    tab.keyboard.press("j")
    assert tab.locator("#completion").text_content() == "(no tokens)"

    tab.keyboard.press("/")
    tab.keyboard.type("owl")  # in a prompt; typing does not walk
    assert order(tab) == [2] and heading.text_content() == "Completion 2"
    assert tab.locator("#found").text_content() == "1 of 4"
    tab.fill("#search", "ABCDEF")  # over tokens
    assert order(tab) == [4]
    tab.fill("#search", "nowhere")
    assert order(tab) == []
    tab.keyboard.press("Escape")
    tab.keyboard.press("j")
    assert heading.text_content() == "Completion 4"


def test_the_most_extreme_tokens_lead_to_their_completions(open_page):
    tab = open_page(rows())
    lowest = tab.locator("#lowest li").first
    assert lowest.text_content().startswith("  -7.50  The answer </script>")
    tab.keyboard.press("j")
    tab.locator("#highest li").nth(1).click()
    assert tab.locator("#about").text_content() == "Completion 2" and tab.locator(".marked").text_content() == "short"
    lowest.click()
    assert tab.locator("#about").text_content() == "Completion 1" and tab.locator(".marked").text_content() == NASTY


def test_the_histogram_has_every_score(open_page):
    tab = open_page(rows())
    assert tab.locator("#histogram rect").count() == 61
    counts, edges = tab.evaluate("data.histogram.counts"), tab.evaluate("data.histogram.edges")
    assert sum(counts) == 16 and counts[0] == 1 and counts[-1] == 1  # -7.5 and 6.0, further out than 6 nats
    assert counts[next(place for place, edge in enumerate(edges) if edge > -0.5) - 1] == 10


def test_a_thousand_completions_stay_fluid(open_page):
    tokens, scores = [f" word{number}" for number in range(500)], [(number % 41 - 20) / 4 for number in range(500)]
    tab = open_page([make_row(tokens, scores) for _ in range(1000)])
    seconds = tab.evaluate("performance.now()") / 1000
    assert seconds < 10, seconds
    assert tab.locator("#list li").count() == 1000
    assert tab.locator("#completion .token").count() == 500
    assert tab.locator(".token").count() == 520  # those of the extreme ones beside it, and of no other completion
    times = tab.evaluate(
        """() => [["j"], ["j"], ["k"]].map(([key]) => {
            const start = performance.now();
            document.dispatchEvent(new KeyboardEvent("keydown", {key}));
            document.body.getBoundingClientRect();
            return performance.now() - start;
        })"""
    )
    assert max(times) < 500, times  # milliseconds; a few tens on an idle core
    assert tab.locator("#about").text_content() == "Completion 2"


def test_the_page_of_a_run_opens(make_trainer, browser):
    trainer = make_trainer("internvl", log_completions=True, num_completions_to_print=0, max_steps=1)
    trainer.train()
    tab = browser.new_page()
    tab.goto(Path(trainer.args.output_dir, "token_scores", "train_00001.html").resolve().as_uri())
    assert tab.locator("#completion .token").count() > 0 and tab.locator("#images img").count() > 0
    assert tab.locator("#list li").count() == 4
    tab.close()
