"""Tables that the jobs print at the end."""

from rich.table import Table
from rich.text import Text

from msense.cli.console import console
from msense.evaluation.report import Evaluation, tables
from msense.text import clean


def show(found: Evaluation) -> None:
    """Print all tables to stdout."""
    out = console()
    for sheet in tables(found):
        table = Table(
            title=Text(clean(sheet.title)),
            title_justify="left",
            caption=Text(clean(sheet.what)),
            caption_justify="left",
            box=None,
            collapse_padding=True,  # fits the ten columns of costs into 100 characters
            pad_edge=False,
        )
        for number, name in enumerate(sheet.head):
            table.add_column(Text(clean(name)), justify="right" if number else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        out.print(table)
        out.print()
