"""The local web application: every page is a view as HTML. No request leaves it, and it loads nothing from elsewhere.

Text from a dictionary is never markup: templates escape everything, and the content security policy forbids inline scripts
and styles. Pages work without JavaScript, which adds search as you type and the slider.
"""

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from msense.errors import InputError, MsenseError
from msense.explorer.charts import draw
from msense.explorer.contents import Contents
from msense.explorer.overview import RANKINGS
from msense.explorer.render import FOLDER, LONGEST, environment, export_words
from msense.explorer.sentence import sentence_spans
from msense.explorer.training import budget_chart, charts
from msense.explorer.word import DEFAULT_LEVEL, text_of, token_view, word_page
from msense.text import plain

LONGEST_TEXT = 5_000  # characters of a sentence
_PAGE_ROWS = 50
_MOMENT = 0.2  # seconds that a page waits for the index of neighbours before it shows how much of it is made
_MOST_EXPORTED = 20  # words
_COOKIE = "msense_token"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_IMAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # of a chart, opened by itself
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(contents: Contents, *, token: str | None = None, hosts: tuple[str, ...] = ()) -> Starlette:
    """Return the application.

    Args:
        contents: what it shows.
        token: what a browser must show once, as `?token=`; None: nothing, for a server that only this machine reaches.
        hosts: accepted values of the Host header besides localhost, against DNS rebinding; "*": all.
    """
    pages = Pages(contents)
    routes = [
        Route("/", pages.home),
        Route("/word", pages.word),
        Route("/token/{token:int}", pages.token),
        Route("/neighbours/{token:int}/{sense:int}", pages.neighbours),
        Route("/search", pages.search),
        Route("/sentence", pages.sentence),
        Route("/compare", pages.compare),
        Route("/compare/{token:int}", pages.compare_token),
        Route("/export", pages.export),
        Route("/training", pages.training),
        Route("/chart/{name}/{number:int}", pages.chart),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
    ]
    guards = [
        Middleware(BaseHTTPMiddleware, dispatch=_with_headers),
        Middleware(
            TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1", *hosts], www_redirect=False
        ),
    ]
    if token is not None:
        guards.append(Middleware(BaseHTTPMiddleware, dispatch=_token_guard(token)))
    handlers: dict[Any, Any] = {MsenseError: pages.failed, HTTPException: pages.failed}
    return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)


class Pages:
    """The pages, each of which Starlette runs in a thread."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._templates = environment()
        self._templates.globals |= {"contents": contents}

    def home(self, request: Request) -> Response:
        """Show the dictionary: numbers, histogram, and tokens by a ranking."""
        by = request.query_params.get("by", "count")
        first = _number(request, "first", 0, 0, 1 << 31, int)
        rows = self._contents.statistics.ranked(by, _PAGE_ROWS, first)
        own = {"by": by, "first": first, "rows": rows, "rankings": tuple(RANKINGS), "step": _PAGE_ROWS}
        curve = budget_chart(self._contents.origin) if self._contents.origin else None
        return self._page("dictionary.html", overview=self._contents.overview, curve=curve, **own)

    def word(self, request: Request) -> Response:
        """Show a word and its tokens."""
        word = request.query_params.get("q", "")[:LONGEST]
        level = _level(request)
        if not word.strip():
            return RedirectResponse("/", 303)
        page = word_page(self._contents.dictionary, word, level=level)
        return self._page("word.html", 200 if page.tokens else 404, page=page, level=level)

    def token(self, request: Request) -> Response:
        """Show a token."""
        level = _level(request)
        view = token_view(self._contents.dictionary, request.path_params["token"], level=level)
        return self._page("token.html", view=view, level=level)

    def neighbours(self, request: Request) -> Response:
        """Show the nearest senses of other tokens, or how much of their index is made."""
        if (done := self._contents.index(_MOMENT)) < 1:
            return self._page("waiting.html", 202, done=done)
        token, sense = request.path_params["token"], request.path_params["sense"]
        near = self._contents.neighbours(token, sense)
        name = text_of(self._contents.dictionary, token)
        return self._page("neighbours.html", token=token, sense=sense, text=name, neighbours=near)

    def search(self, request: Request) -> Response:
        """Show the words that match a query: a list for the search field, without the page around it."""
        search = self._contents.search
        hits = search.find(request.query_params.get("q", ""), 12) if search else []
        return self._page("hits.html", hits=hits)

    def sentence(self, request: Request) -> Response:
        """Show one or two sentences with the senses of their tokens."""
        reader = self._contents.reader
        if reader is None:
            raise InputError("nothing reads a sentence: open a student, or name the teacher with --teacher")
        texts = [request.query_params.get(name, "")[:LONGEST_TEXT] for name in ("text", "other")]
        shown = [sentence_spans(reader, text) for text in texts if text.strip()]
        return self._page("sentence.html", texts=texts, sentences=shown)

    def compare(self, request: Request) -> Response:
        """Show the words that two corpora use most differently."""
        if self._contents.other is None:
            raise InputError("there is no second dictionary: open one with --compare DICTIONARY")
        first = _number(request, "first", 0, 0, 1 << 31, int)
        every = self._contents.differences()
        rows = every[first : first + _PAGE_ROWS]
        return self._page("compare.html", rows=rows, first=first, step=_PAGE_ROWS, total=len(every))

    def compare_token(self, request: Request) -> Response:
        """Show a token's senses in both dictionaries, side by side."""
        if self._contents.other is None:
            raise InputError("there is no second dictionary: open one with --compare DICTIONARY")
        level, token = _level(request), request.path_params["token"]
        views = [token_view(own, token, level=level) for own in (self._contents.dictionary, self._contents.other)]
        return self._page("both.html", views=views, level=level)

    def training(self, request: Request) -> Response:
        """Show the metrics of the trainings, and the evaluations."""
        if not self._contents.trainings and not self._contents.evaluations:
            raise InputError("there is no training: open the run of a distillation, or name some with --trainings RUN")
        curves, speeds = charts(self._contents.trainings), self._contents.speeds()
        return self._page("training.html", charts=curves, speeds=speeds)

    def chart(self, request: Request) -> Response:
        """Return a chart of a page as an image, for a dark page with `?dark=1`."""
        shown, origin = self._contents, self._contents.origin
        every = {
            "senses": lambda: [shown.overview.chart],
            "budget": lambda: [curve] if origin and (curve := budget_chart(origin)) else [],
            "training": lambda: charts(shown.trainings),
            "evaluation": lambda: [own.chart for own in shown.speeds()],
        }
        own = every.get(request.path_params["name"], list)()
        if (number := request.path_params["number"]) >= len(own):
            raise HTTPException(404)
        image = draw(own[number], dark=request.query_params.get("dark") == "1")
        return Response(image, media_type="image/svg+xml", headers={"Content-Security-Policy": _IMAGE_POLICY})

    def export(self, request: Request) -> Response:
        """Return one self-contained file of the words that are named, to keep or to send."""
        words = [word[:LONGEST] for word in request.query_params.getlist("q") if word.strip()][:_MOST_EXPORTED]
        if not words:
            raise InputError("no word is named: use /export?q=WORD, once per word")
        self._contents.index()
        page = export_words(self._contents.dictionary, words, level=_level(request))
        return HTMLResponse(page, headers={"Content-Disposition": 'attachment; filename="senses.html"'})

    async def failed(self, _: Request, error: Exception) -> Response:
        """Show an expected error."""
        if isinstance(error, HTTPException):
            return self._page("error.html", error.status_code, message=error.detail)
        return self._page("error.html", 400 if isinstance(error, InputError) else 500, message=plain(str(error)))

    def _page(self, name: str, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(self._templates.get_template(name).render(**values), status)


def _level(request: Request) -> float:
    return _number(request, "level", round(100 * DEFAULT_LEVEL), 0, 100, float) / 100


def _number(request: Request, name: str, default: float, least: float, most: float, kind: type[Any]) -> Any:
    """Return a number of the query; raise InputError if it is none or out of range."""
    given = request.query_params.get(name, str(default))
    try:
        value = kind(given)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise InputError(f"{name} is {given[:LONGEST]!r}, but must be a number from {least} to {most}")
    return value


async def _with_headers(request: Request, call_next: Endpoint) -> Response:
    response = await call_next(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _token_guard(token: str) -> Callable[[Request, Endpoint], Awaitable[Response]]:
    """Return a middleware that lets only requests with the token pass, and keeps it in a cookie."""

    async def guard(request: Request, call_next: Endpoint) -> Response:
        given = request.query_params.get("token")
        if given is not None and secrets.compare_digest(given.encode(), token.encode()):
            response: Response = RedirectResponse("/" + request.url.path.lstrip("/"), 303)  # it leaves the address bar
            response.set_cookie(_COOKIE, token, httponly=True, samesite="strict")
            return response
        if secrets.compare_digest(request.cookies.get(_COOKIE, "").encode(), token.encode()):
            return await call_next(request)
        return PlainTextResponse("open the address that msense explore printed, with its token\n", 403)

    return guard
