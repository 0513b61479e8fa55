"""Text that test runs write into pages, between a pair of HTML comments."""

import re
from pathlib import Path


def write_between(page: Path, name: str, text: str) -> bool:
    """Write text between the comments `<!-- NAME: begin -->` and `<!-- NAME: end -->`; return whether that changed the page."""
    old = page.read_text(encoding="utf-8")
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    assert len(pattern.findall(old)) == 1, f"{page} needs one pair of lines {begin} and {end}"
    new = pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old)
    if new != old:
        page.write_text(new, encoding="utf-8")
    return new != old
