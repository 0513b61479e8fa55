"""The pages through the application's test client: contents, hostile words, headers, token."""

import base64
import hashlib
import json
import re
import signal
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from explored import EMOJI, EVIL, HEBREW, HOSTILE, SCRIPT, WORDS, hostile_dictionary
from starlette.testclient import TestClient
from tiny import make

from msense.__main__ import main
from msense.cli.explore import is_loopback
from msense.dictionary import SenseDictionary
from msense.errors import InputError
from msense.explorer.app import make_app
from msense.explorer.contents import Contents, open_contents
from msense.explorer.render import export_words
from msense.explorer.training import charts, read_training

LOCAL = "http://localhost"


class Checked(HTMLParser):
    """Collect the links of a page; fail for markup that a policy without inline code would block or that comes from text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert tag not in ("style", "iframe", "object")
        assert tag != "img" or (given["src"] or "").startswith("/chart/")
        assert tag != "script" or given == {"src": "/static/explorer.js", "defer": None}
        assert not [name for name in given if name.startswith("on") or name == "style"]
        self.links += [given[name] or "" for name in ("href", "src", "srcset", "action") if name in given]


def checked(text: str) -> list[str]:
    page = Checked()
    page.feed(text)
    shown = re.sub(r'(?s)<textarea.*?</textarea>| value="[^"]*"', "", text)  # fields keep what was typed
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert all(link.startswith(("/", "#")) and not link.startswith("//") for link in page.links)
    return page.links


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> SenseDictionary:
    return hostile_dictionary(tmp_path_factory.mktemp("explorer") / "d")


@pytest.fixture(scope="module")
def client(dictionary: SenseDictionary) -> TestClient:
    return TestClient(make_app(Contents(dictionary, other=dictionary)), base_url=LOCAL, raise_server_exceptions=False)


@pytest.mark.parametrize("path", ["/", "/?by=ambiguity", "/word?q=bank", "/compare", "/token/0", "/neighbours/1/0"])
def test_pages_are_whole_and_load_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for link in checked(page.text):
        if link.startswith("/") and "?" not in link:
            assert client.get(link).status_code in (200, 400 if link == "/sentence" else 200), link


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_are_text(client: TestClient, word: str) -> None:
    token = WORDS.index(word)
    pages = [
        client.get(f"/token/{token}"),
        client.get("/word", params={"q": word}),
        client.get(f"/neighbours/{token}/0"),
    ]
    pages += [client.get("/search", params={"q": word[:50]}), client.get("/"), client.get("/compare")]
    for page in pages:
        checked(page.text)
        assert len(page.text) < 40_000 + 3 * 20_000
    assert pages[0].status_code == pages[2].status_code == pages[3].status_code == 200
    assert "<li>" in pages[3].text
    if word in (HEBREW, EMOJI):
        assert f"<bdi>{word}</bdi>" in pages[0].text
        assert pages[1].status_code == 200
    if word == SCRIPT:
        assert "<bdi>&lt;script&gt;alert(1)&lt;/script&gt;</bdi>" in pages[0].text


def test_a_word_page_has_every_sense_and_its_example(client: TestClient, dictionary: SenseDictionary) -> None:
    page = client.get("/word?q=bank&level=0").text
    for sense, count in enumerate(dictionary.senses(1).counts.tolist()):
        assert f'id="sense-1-{sense}"' in page
        assert f"count {count}, share" in page
    assert "<mark>bank</mark>" in page
    assert page.count("<details") == 3
    assert client.get("/word?q=bank&level=100").text.count("<details") == 1
    assert client.get("/word?q=+", follow_redirects=False).headers["location"] == "/"


def test_search_links_to_tokens(client: TestClient) -> None:
    assert 'href="/token/1"' in client.get("/search?q=BA").text
    assert "Nothing found" in client.get("/search?q=nothing").text
    assert "<html" not in client.get("/search?q=ba").text


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/token/99", 400, "token 99 is not in the vocabulary"),
        ("/token/99999999999999999999999", 400, "is not in the vocabulary"),
        ("/neighbours/1/7", 400, "has no sense 7"),
        ("/word?q=bank&level=200", 400, "level is &#39;200&#39;, but must be a number from 0 to 100"),
        ("/word?q=bank&level=nan", 400, "level is &#39;nan&#39;"),
        ("/?by=<b>", 400, "no ranking &#39;&lt;b&gt;&#39;"),
        ("/?first=-1", 400, "first is &#39;-1&#39;"),
        ("/word?q=<i>x", 404, "is unknown to the tokenizer"),
        ("/sentence?text=a", 400, "nothing reads a sentence"),
        ("/nowhere", 404, "Not Found"),
        ("/static/../app.py", 404, "Not Found"),
        ("/static/%2e%2e/app.py", 404, "Not Found"),
    ],
)
def test_errors_are_pages(client: TestClient, path: str, status: int, message: str) -> None:
    page = client.get(path)
    assert (page.status_code, message in page.text) == (status, True), page.text
    checked(page.text)


def test_other_hosts_and_methods_are_refused(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "127.0.0.1:8765"}).status_code == 200
    assert client.post("/").status_code == 405


def test_a_token_is_needed_once(dictionary: SenseDictionary) -> None:
    app = make_app(Contents(dictionary), token="secret", hosts=("*",))
    client = TestClient(app, base_url="http://10.0.0.1", follow_redirects=False)
    for path in ("/", "/static/explorer.js", "/?token=wrong", "/?token=", "/?token=é"):
        refused = client.get(path)
        assert refused.status_code == 403
        assert "content-security-policy" in refused.headers
    granted = client.get("/word?token=secret")
    assert (granted.status_code, granted.headers["location"]) == (303, "/word")
    assert re.search("HttpOnly.*SameSite=strict", granted.headers["set-cookie"])
    assert client.get("http://10.0.0.1//evil.example?token=secret").headers["location"] == "/evil.example"
    assert client.get("/").status_code == 200
    client.cookies.set("msense_token", "wrong")
    assert TestClient(app, base_url="http://10.0.0.1", cookies={"msense_token": "wrong"}).get("/").status_code == 403


def test_only_loopback_needs_no_token() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "")))


def test_a_student_reads_a_sentence(shipped_student: tuple) -> None:
    contents = open_contents(str(shipped_student[3]))
    client = TestClient(make_app(contents), base_url=LOCAL)
    page = client.get("/sentence", params={"text": "the <b>bank", "other": "near the bank\u202e"})
    assert page.status_code == 200
    assert 'class="sure-' in page.text
    assert "a river " in page.text
    checked(page.text)
    assert client.get("/sentence").status_code == 200


def test_without_a_tokenizer_and_examples() -> None:
    client = TestClient(make_app(Contents(make([2, 0, 1]))), base_url=LOCAL)
    assert "token 2" in client.get("/").text
    assert client.get("/token/0").status_code == 200
    assert "Nothing found" in client.get("/search?q=a").text
    assert client.get("/word?q=bank").status_code == 400


def test_nothing_is_opened_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing at "):
        open_contents(str(tmp_path / "nothing"))
    make([1]).save(tmp_path / "a")
    make([1], dim=4).save(tmp_path / "b")
    with pytest.raises(InputError, match="dim is 3 in one dictionary and 4"):
        open_contents(str(tmp_path / "a"), str(tmp_path / "b"))
    assert open_contents(str(tmp_path / "a")).overview.senses == 1
    assert np.isfinite(open_contents(str(tmp_path / "a"), str(tmp_path / "a")).overview.distortion)


@pytest.mark.integration
def test_the_command_serves_on_a_free_port(dictionary: SenseDictionary, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "msense", "explore", str(dictionary.tokenizer_file.parents[1]), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
            with urlopen(address) as page:
                assert page.status == 200
                assert "default-src 'none'" in page.headers["content-security-policy"]
                assert b"<h1>Dictionary</h1>" in page.read()
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130)


@pytest.mark.integration
def test_the_command_stops_while_it_prepares_pages(dictionary: SenseDictionary) -> None:
    words = [sys.executable, "-m", "msense", "explore", str(dictionary.tokenizer_file.parents[1]), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline()
        server.send_signal(signal.SIGINT)
        assert (server.wait(60), "terminate" in server.stderr.read()) == (130, False)


def test_an_export_is_one_file_that_loads_and_runs_nothing(client: TestClient, dictionary: SenseDictionary) -> None:
    exported = client.get("/export", params={"q": ["bank", SCRIPT, EVIL, "nothing"], "level": "0"})
    assert exported.status_code == 200
    assert exported.headers["content-disposition"] == 'attachment; filename="senses.html"'
    page = exported.text
    style = re.search("<style>(.*)</style>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"content=\"default-src 'none'; style-src 'sha256-{digest}'\"" in page.replace("&#39;", "'")
    rest = page.replace(style[0], "")
    assert all(link.startswith("#") for link in checked(rest))
    assert "<script" not in rest
    assert "url(" not in style[1]
    assert "<bdi>&lt;script&gt;alert(1)&lt;/script&gt;</bdi>" in page
    assert "is unknown to the tokenizer" in page
    near = dictionary.neighbours(1, 0, 1)[0]
    assert re.search(rf"Near: <bdi>.*</bdi> <small>{near.sense}</small>", page)
    assert client.get("/export").status_code == 400
    assert client.get("/export?q=+").status_code == 400


def test_an_export_by_the_command_is_that_of_the_page(
    client: TestClient, dictionary: SenseDictionary, tmp_path: Path
) -> None:
    folder = str(dictionary.tokenizer_file.parents[1])
    assert main(["explore", folder, "bank", "--export", str(tmp_path / "f.html")]) == 0
    assert (tmp_path / "f.html").read_text().rstrip() == client.get("/export?q=bank").text.rstrip()
    assert main(["explore", folder, "nothing", "--export", str(tmp_path / "g.html")]) == 1


def test_a_notebook_shows_a_word_and_a_text_in_frames(dictionary: SenseDictionary, shipped_student: tuple) -> None:
    encoder = shipped_student[0]
    frames = dictionary.plot(SCRIPT), encoder.explain("the <b>bank\u202e")
    assert repr(frames[0]) == f"Frame({SCRIPT!r})"
    pages = []
    for frame in frames:
        html = frame._repr_html_()
        assert html.startswith("<iframe sandbox ")
        assert html.count("<") == 2
        pages.append(unescape(html.partition('srcdoc="')[2].rpartition('"')[0]))
        checked(re.sub("(?s)<style>.*</style>", "", pages[-1]))
        assert 'href="/' not in pages[-1]
    assert pages[0] == export_words(dictionary, [SCRIPT])
    assert 'class="sure-' in pages[1]


def test_a_token_of_two_dictionaries_has_ids_of_its_own(client: TestClient) -> None:
    page = client.get("/compare/1")
    assert page.status_code == 200
    ids = re.findall(' id="([^"]*)"', page.text)
    assert len(ids) == len(set(ids))
    assert {"sense-1-0", "second-sense-1-0"} <= set(ids)
    assert {link[1:] for link in checked(page.text) if link.startswith("#")} <= set(ids)
    assert re.search(r"href=\"/compare/\d\"", client.get("/compare").text)


def test_trainings_are_drawn_together(dictionary: SenseDictionary, tmp_path: Path) -> None:
    for name, values in (("a", [0.2, 0.6]), ("b", [0.4])):
        lines = [{"epoch": i + 1, "step": 10 * (i + 1), "held_out": y, "x": float("nan")} for i, y in enumerate(values)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainings = [read_training(str(tmp_path / name)) for name in ("a", "b")]
    (chart,) = charts(trainings)
    assert (chart.title, chart.x) == ("held_out", "steps")
    assert [line.points for line in chart.series] == [((10, 0.2), (20, 0.6)), ((10, 0.4),)]
    client = TestClient(make_app(Contents(dictionary, trainings=tuple(trainings))), base_url=LOCAL)
    page = client.get("/training")
    assert page.status_code == 200
    checked(page.text)
    assert "0.6 at 20 steps" in page.text
    light, dark = (client.get(f"/chart/training/0{query}") for query in ("", "?dark=1"))
    assert light.headers["content-type"] == "image/svg+xml"
    assert light.text != dark.text
    assert [client.get(f"/chart/{name}").status_code for name in ("training/1", "budget/0", "none/0")] == [404] * 3
    assert 'href="/training"' in client.get("/").text
    assert read_training(str(tmp_path)) is None
    for damaged in ("{", "[]", '{"step": 1' + "0" * 400 + "}"):
        (tmp_path / "a" / "metrics.jsonl").write_text(damaged)
        with pytest.raises(InputError, match="has no metrics of epochs"):
            read_training(str(tmp_path / "a"))
