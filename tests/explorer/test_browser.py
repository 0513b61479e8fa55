"""The pages in a headless Chromium: typing, clicks, keys, narrow and dark screens, hostile words, accessibility, pictures.

Skipped where there is no Chromium or no playwright. MSENSE_AXE=axe.min.js (of the npm package axe-core) checks accessibility;
MSENSE_PICTURES=DIR keeps the pictures: of small made-up contents, or of MSENSE_SOURCE (a run of the demo) with MSENSE_BESIDE
(a second dictionary, a training and an evaluation, separated by colons).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from explored import EMOJI, HEBREW, HOSTILE, LONG, SCRIPT, WORDS, hostile_dictionary, served, student_contents
from PIL import Image

from msense.explorer.contents import Contents, open_contents

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
AXE = os.environ.get("MSENSE_AXE", "")
WIDTHS = {"wide": (1280, 900), "narrow": (390, 844)}
PAGES = ("dictionary", "word", "token", "neighbours", "sentence", "compare", "both", "training", "error")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
# what a page must not have: elements wider than the screen, and texts of drawings outside them
FAULTS = """() => {
  const found = [], wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) found.push('page ' + document.documentElement.scrollWidth);
  for (const text of document.querySelectorAll('svg text')) {
    const own = text.getBoundingClientRect(), box = text.ownerSVGElement.getBoundingClientRect();
    const across = own.left < box.left - 1 || own.right > box.right + 1;
    if (own.width && (across || own.top < box.top - 1 || own.bottom > box.bottom + 1)) found.push('text ' + text.textContent);
  }
  return found;
}"""


class Site(NamedTuple):
    """A served explorer."""

    url: str
    contents: Contents
    word: str  # with several senses
    several: str  # a word of several tokens
    texts: tuple[str, str]

    def path(self, page: str) -> str:
        """Return the address of a page of `PAGES`."""
        token = self.contents.dictionary.lookup(self.word).tokens[0].token_id
        text, other = map(quote, self.texts)
        return (
            self.url
            + {
                "dictionary": "/",
                "word": f"/word?q={self.word}",
                "token": f"/token/{token}",
                "neighbours": f"/neighbours/{token}/0",
                "sentence": f"/sentence?text={text}&other={other}",
                "compare": "/compare",
                "both": f"/compare/{self.contents.differences()[0].token}",
                "training": "/training",
                "error": "/nowhere",
            }[page]
        )


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("explored")
    contents = student_contents(teacher, folder)
    sizes = {word: contents.dictionary.lookup(word).tokens for word in ("bank", "river", "money", "cat", "dog", "mat")}
    word = max(sizes, key=lambda word: max((token.senses for token in sizes[word]), default=0))
    with served(contents) as url:
        yield Site(url, contents, word, "running", (f"the {word} is near", f"a {word} of money"))


@pytest.fixture(scope="module")
def pictured(site: Site) -> Iterator[Site]:
    """The site of which pictures are taken."""
    if not (source := os.environ.get("MSENSE_SOURCE")):
        yield site
        return
    compare, trainings, evaluations = os.environ["MSENSE_BESIDE"].split(os.pathsep)
    contents = open_contents(source, compare, [trainings], [evaluations])
    with served(contents) as url:
        yield Site(url, contents, "tree", "scikit", ("a leaf of the tree", "the decision tree"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    dictionary = hostile_dictionary(tmp_path_factory.mktemp("hostile") / "d")
    with served(Contents(dictionary, other=dictionary)) as url:
        yield url


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens an address; no page may then have errors in its console or load from elsewhere."""
    contexts, troubles = [], []

    def opened(url: str, *, width: str = "wide", status: int = 200, **options: Any) -> Any:
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        context = chromium.new_context(viewport=size, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        origin = "/".join(url.split("/")[:3])
        page.on("request", lambda sent: None if sent.url.startswith(origin + "/") else troubles.append(sent.url))
        answer = page.goto(url)
        assert answer is None or answer.status == status
        if status != 200:
            troubles[:] = [own for own in troubles if f"status of {status}" not in own]
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def test_typing_a_word_lists_it_and_a_key_opens_it(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url)
    page.get_by_label("Word", exact=True).press_sequentially(site.word[:2])
    page.wait_for_selector("#hits li")
    assert site.word in page.locator("#hits").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('#hits') !== null")
    page.keyboard.press("Escape")
    assert page.locator("#hits li").count() == 0
    page.get_by_label("Word", exact=True).fill(site.word)
    page.keyboard.press("Enter")
    page.wait_for_url("**/word?q=*")
    assert page.locator("h1").inner_text() == site.word


def test_a_word_of_several_tokens_is_found(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url)
    page.get_by_label("Word", exact=True).fill(site.several)
    page.locator("#hits a", has_text=site.several).click()
    page.wait_for_url("**/word?q=*")
    assert page.locator("section.token").count() > 1
    assert "splits this word" in page.locator("main").inner_text()


def test_the_slider_folds_senses_without_leaving_the_page(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.path("word") + "&level=0")
    every = page.locator("details.group").count()
    assert every == page.locator("article.sense").count() > 1
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("End")
    expect(page.locator("details.group")).to_have_count(1)
    assert page.locator(".level output").inner_text() == "100 %"
    assert page.locator("article.sense").count() == every
    assert "level=100" in page.url
    page.keyboard.press("Home")
    expect(page.locator("details.group")).to_have_count(every)


def test_a_sentence_is_typed_and_a_token_and_a_sense_clicked(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url + "/sentence")
    for label, text in zip(("Text", "A second text, to compare"), site.texts, strict=True):
        page.get_by_label(label, exact=True).fill(text)
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector(".spans")
    assert page.locator(".spans").all_inner_texts() == list(site.texts)
    assert page.locator(".choices:visible").count() == 0
    page.locator(".spans a", has_text=site.word).first.click()
    shown = page.locator(".choices:visible")
    assert shown.count() == 2  # of both sentences
    assert all("%" in text and "sense" in text for text in shown.all_inner_texts())
    assert page.locator(".choices:visible mark").count()
    shown.first.locator("li a").first.click()
    page.wait_for_url("**/token/*#sense-*")
    assert page.locator("article.sense:target").count() == 1


def test_senses_are_named_by_their_neighbours(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.path("word"))
    sense = page.locator("article.sense").first
    expect(sense.locator(".named a").first).to_be_visible()
    names = sense.locator(".named a").all_inner_texts()
    assert 1 <= len(names) == len(set(names)) <= 4
    sense.locator(".named a").first.click()
    page.wait_for_url("**/token/*#sense-*")
    assert page.locator("article.sense:target").count() == 1


def test_keys_alone_reach_the_content_and_read_a_sentence(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url + "/sentence")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type(site.texts[0])
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".spans a")
    page.locator(".spans a").first.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.locator(".choices:visible").count() == 1
    assert page.evaluate("document.activeElement.classList.contains('choices')")


def test_two_dictionaries_side_by_side(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url + "/compare")
    pair = page.locator("tr.pair").first
    expect(pair).to_be_visible()
    assert pair.locator("mark").count() >= 1
    page.locator("tbody a").first.click()
    page.wait_for_url("**/compare/*")
    sections = page.locator("#senses > section")
    assert sections.count() == 2
    boxes = [sections.nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert all(sections.nth(i).locator("article.sense").count() for i in range(2))


def test_an_export_opens_from_a_file_without_a_network(
    site: Site, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    page = open_page(site.path("word"))
    with page.expect_download() as download:
        page.get_by_role("link", name="Save this page").click()
    file = tmp_path / "senses.html"
    download.value.save_as(file)
    alone = open_page(file.as_uri(), offline=True, java_script_enabled=False)
    assert alone.locator("h1").inner_text() == site.word
    assert alone.locator("article.sense").count() == page.locator("article.sense").count()
    assert "Near:" in alone.locator("main").inner_text()
    assert (
        alone.locator("svg.map a").first.evaluate("e => getComputedStyle(e.querySelector('circle')).fillOpacity")
        == "0.35"
    )


@pytest.mark.parametrize("word", HOSTILE)
@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_words_are_text_that_fits(hostile: str, open_page: Callable[..., Any], word: str, width: str) -> None:
    token = WORDS.index(word)
    for path in (f"/token/{token}", f"/neighbours/{token}/0", "/", "/compare", f"/compare/{token}"):
        page = open_page(hostile + path, width=width)
        assert page.evaluate(FAULTS) == []
        assert page.locator("main script, main img:not(.chart)").count() == 0
    if word in (SCRIPT, HEBREW, EMOJI):
        assert word in open_page(f"{hostile}/token/{token}").locator("main").inner_text()
    page = open_page(hostile)
    page.get_by_label("Word", exact=True).fill(word[:200])
    page.wait_for_selector("#hits li")
    assert page.locator("#hits script, #hits img").count() == 0
    assert page.locator("#hits a").count() == 1


def test_a_long_text_and_another_script_are_read(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.url + "/sentence", width="narrow")
    for text in (LONG[:5000], f"the {HEBREW} {SCRIPT} {EMOJI} bank"):
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_role("button", name="Read").click()
        page.wait_for_selector(".spans")
        assert page.locator(".spans").inner_text() == text
        assert page.evaluate(FAULTS) == []


def test_pages_work_without_scripts(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.path("sentence"), java_script_enabled=False)
    assert page.locator(".choices:visible").count() == page.locator(".choices").count() > 0
    page = open_page(site.path("word"), java_script_enabled=False)
    page.get_by_role("button", name="Apply").click()
    page.wait_for_url("**level=*")
    page.get_by_role("link", name="Nearest senses of other tokens").first.click()
    page.wait_for_url("**/neighbours/**")


@pytest.mark.parametrize("page_name", PAGES)
def test_dark_pages_are_dark(site: Site, open_page: Callable[..., Any], page_name: str) -> None:
    status = 404 if page_name == "error" else 200
    lights = []
    for scheme in ("light", "dark"):
        page = open_page(site.path(page_name), status=status, color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lights.append(sum(map(int, colour.strip("rgb()").split(","))))
    assert lights[0] > 700
    assert lights[1] < 120


@pytest.mark.skipif(not AXE, reason="MSENSE_AXE names no axe.min.js: npm pack axe-core")
@pytest.mark.parametrize("page_name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(pictured: Site, open_page: Callable[..., Any], page_name: str, scheme: str) -> None:
    status = 404 if page_name == "error" else 200
    for width in WIDTHS:
        page = open_page(pictured.path(page_name), status=status, color_scheme=scheme, width=width)
        for link in page.locator(".spans a").all():
            link.click()
        page.evaluate(Path(AXE).read_text())
        found, passed = page.evaluate("axe.run().then(r => [r.violations, r.passes.length])")
        assert passed > 10
        shown = [(own["impact"], own["id"], [node["html"] for node in own["nodes"][:3]]) for own in found]
        assert [own for own in shown if own[0] in ("serious", "critical")] == []


@pytest.mark.parametrize("page_name", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(
    pictured: Site, open_page: Callable[..., Any], tmp_path: Path, page_name: str, width: str, scheme: str
) -> None:
    status = 404 if page_name == "error" else 200
    page = open_page(pictured.path(page_name), status=status, width=width, color_scheme=scheme)
    if page_name == "sentence":
        page.locator(".spans a", has_text=pictured.word).first.click()
    if page_name in ("word", "token", "both"):
        expect(page.locator(".named a").first).to_be_visible(timeout=60_000)
        page.wait_for_timeout(2_000)  # for those of the next senses
    if page_name == "compare":
        expect(page.locator("tr.pair").nth(4)).to_be_visible(timeout=60_000)
    assert page.evaluate(FAULTS) == []
    folder = Path(os.environ.get("MSENSE_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    height = min(1_100 if width == "wide" else 1_600, page.evaluate("document.documentElement.scrollHeight"))
    clip = {"x": 0, "y": 0, "width": WIDTHS[width][0], "height": height}
    file = folder / f"{page_name}-{width}-{scheme}.png"
    page.screenshot(path=file, full_page=True, clip=clip)
    with Image.open(file) as picture:
        assert picture.size == (WIDTHS[width][0], height)
        small = picture.quantize(192)
    small.save(file, optimize=True)
