"""What the pages of the explorer show in tests: hostile words, and a student with trainings and a second dictionary."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn
from students import dictionary_of, shipped
from tiny import exemplars, with_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from msense.cli.explore import bound
from msense.dictionary import DictionaryFiles, SenseDictionary
from msense.dictionary.contexts import write_exemplars
from msense.explorer.app import make_app
from msense.explorer.contents import Contents, open_contents

SCRIPT, LONG, HEBREW, EMOJI, EVIL = "<script>alert(1)</script>", "z" * 10_000, "שלום", "🙂", "\"'><img\x1b[31m\u202e"
WORDS = ["[UNK]", "bank", SCRIPT, LONG, HEBREW, EMOJI, EVIL]
HOSTILE = WORDS[2:]


def hostile_dictionary(folder: Path) -> SenseDictionary:
    """Write a dictionary of words that pages must show as text; their examples are these words too."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    with_tokenizer(tokenizer, folder, [0, 3, 2, 1, 2, 1, 2])
    table = exemplars([(token, 0, 0) for token in range(1, 7)])
    for name in ("left", "word", "right"):
        column = table.column_names.index(name)
        table = table.set_column(column, table.schema.field(column), [[*WORDS[1:]]])
    write_exemplars(table, DictionaryFiles(folder).exemplars)
    return SenseDictionary.load(folder)


def student_contents(teacher: Path, folder: Path) -> Contents:
    """Write a student, the metrics of two trainings and a second dictionary, and open them."""
    shipped(teacher, folder / "run" / "student", "static")
    dictionary_of(teacher, seed=1, temperature_unit=20.0, max_length=24).save(folder / "other")
    for name, best in (("run", 0.6), ("second", 0.5)):
        (folder / name).mkdir(exist_ok=True)
        lines = [{"epoch": i, "step": 10 * i, "sense": 2 / i, "held_out": best - 0.2 / i} for i in (1, 2, 3)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_contents(str(folder / "run"), str(folder / "other"), [str(folder / "second")])


@contextmanager
def served(contents: Contents) -> Iterator[str]:
    """Serve contents from a thread of this process; yield the address."""
    with bound("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(contents), log_level="error"))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
