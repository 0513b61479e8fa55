"""Texts in chunks, of which a few are held at once, computed by several threads in their order, with a progress bar."""

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from msense.constants import MAX_INT32
from msense.errors import InputError
from msense.student.tokenizer import check_text

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def check_texts(texts: Any) -> None:
    """Raise InputError for what is no iterable of texts, and for a list of which one is not."""
    single = isinstance(texts, str | bytes | bytearray | memoryview | Mapping) or not isinstance(texts, Iterable)
    if single or getattr(texts, "ndim", 1) != 1:  # a table of pandas iterates over the names of its columns
        raise InputError(f"texts has type {type(texts).__name__}: give a str, or a list of them")
    if isinstance(texts, list | tuple):
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                check_text(f"text {number}", text)


def check_positive(name: str, value: object) -> None:
    """Raise InputError for a value that is not an integer from 1 to 2^31 - 1."""
    try:
        valid = not isinstance(value, bool) and 1 <= operator.index(value) <= MAX_INT32  # type: ignore[arg-type]
    except TypeError:
        valid = False
    if not valid:
        raise InputError(f"invalid {name} {value!r}: use an integer from 1 to {MAX_INT32}")


def chunks(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    """Yield lists of `size` items, the last one shorter.

    Example:
        >>> list(chunks("abcde", 2))
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def map_in_order(function: Callable[[ItemT], ResultT], items: Iterable[ItemT], num_workers: int) -> Iterator[ResultT]:
    """Yield the result of each item in order, computed by threads; at most `num_workers` + 1 items are held."""
    if num_workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque[Future[ResultT]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def progress_bar(items: Any, *, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds a number of finished items to a bar on stderr, whose total is known for sized items."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("encode", total=len(items) if isinstance(items, Sized) else None)
        yield lambda count: bar.advance(task, count)
