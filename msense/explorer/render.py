"""Views as HTML: templates that escape everything, and self-contained pages, to send or for a notebook."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from msense.dictionary import SenseDictionary
from msense.explorer.sentence import Reader, sentence_spans
from msense.explorer.word import (
    DEFAULT_LEVEL,
    MOST_GROUPED,
    NeighbourView,
    SenseView,
    TokenView,
    neighbour_views,
    word_page,
)
from msense.text import clean

FOLDER = Path(__file__).parent
LONGEST = 200  # characters of a token or word that are shown
_MOST_MAPPED = 200  # senses of a token
_LABEL = 0.055, 0.035  # width and height of a number on a map, in parts of it
_NAMED = 20  # senses of a token whose neighbours are exported: the largest


def environment() -> Environment:
    """Return the templates with their filters."""
    own = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own.globals |= {"most_mapped": _MOST_MAPPED, "most_grouped": MOST_GROUPED}
    own.filters |= {
        "apart": apart,
        "number": number,
        "short": short,
        "clean": clean,
        "quoted": lambda text: quote(text, safe=""),
    }
    return own


def number(value: float) -> str:
    """Return a number in about three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def apart(senses: Sequence[SenseView]) -> set[int]:
    """Return the senses whose numbers can stand on a map without covering each other, the first first."""
    kept: list[SenseView] = []
    for sense in senses:
        if all(abs(sense.x - other.x) > _LABEL[0] or abs(sense.y - other.y) > _LABEL[1] for other in kept):
            kept.append(sense)
    return {sense.sense for sense in kept}


def short(text: str) -> str:
    """Return text of a dictionary as shown: without invisible characters, and not too long."""
    text = clean(text)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def export_words(dictionary: SenseDictionary, words: Sequence[str], *, level: float = DEFAULT_LEVEL) -> str:
    """Return one HTML page of words with their senses, examples, maps and neighbours, which loads nothing and runs nothing.

    `level` and errors are those of `word_page`.
    """
    pages = [word_page(dictionary, word, level=level) for word in words]
    near = {
        key: views for page in pages for view in page.tokens for key, views in _neighbours(dictionary, view).items()
    }
    return _alone("export.html", config=dictionary.config, level=level, near=near, pages=pages)


class Frame:
    """A self-contained page in a notebook, in a frame of its own that runs nothing."""

    def __init__(self, title: str, page: str) -> None:
        self._title, self._page = short(title), page

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._title!r})"

    def _repr_html_(self) -> str:
        title, page = escape(self._title), escape(self._page)
        return f'<iframe sandbox title="{title}" width="100%" height="600" srcdoc="{page}"></iframe>'


def plot(dictionary: SenseDictionary, word: str, *, level: float = DEFAULT_LEVEL) -> Frame:
    """Return the senses of a word for a notebook; arguments and errors are those of `word_page`.

    Example:
        >>> plot(dictionary, "tree")  # the last line of a cell
    """
    return Frame(word, export_words(dictionary, [word], level=level))


def explain(encoder: Reader, text: str) -> Frame:
    """Return a text with the senses of its tokens for a notebook; errors are those of `sentence_spans`.

    Example:
        >>> explain(encoder, "a leaf of the tree")  # the last line of a cell
    """
    return Frame(text, _alone("explained.html", spans=sentence_spans(encoder, text)))


def _alone(template: str, **values: Any) -> str:
    """Return a page with its style inside, and a policy that allows that style and nothing else."""
    style = (FOLDER / "static" / "explorer.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'"
    return environment().get_template(template).render(policy=policy, style=style, **values)


def _neighbours(dictionary: SenseDictionary, view: TokenView) -> dict[tuple[int, int], list[NeighbourView]]:
    """Return the neighbours of the largest senses of a token, by token and sense."""
    own = view.senses[:_NAMED]
    return {(sense.token, sense.sense): neighbour_views(dictionary, sense.token, sense.sense, 5) for sense in own}
