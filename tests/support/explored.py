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
from msense.evaluation.cost import Cost
from msense.evaluation.report import Evaluation, TaskReport, write_report
from msense.evaluation.result import Result
from msense.explorer.app import make_app
from msense.explorer.contents import Contents, open_contents
from msense.io import storage

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
    write_run(folder / "run")
    write_evaluation(folder / "e.json")
    trainings, evaluations = [str(folder / "second")], [str(folder / "e.json")]
    return open_contents(str(folder / "run"), str(folder / "other"), trainings, evaluations)


def write_run(folder: Path) -> None:
    """Write what a build says of its corpus, and its estimates for other budgets."""
    stages = {
        "passages": {"documents": 40, "passages": 50, "tokens": 6000},
        "senses": {"budget_curve": [[20 * i, 9.0 / i] for i in (1, 2, 3, 4, 6, 8)]},
    }
    inputs = {f"{name}.txt": "1" for name in (SCRIPT, "b")}
    manifest = {"config": {}, "corpus": ["texts/*.txt"], "inputs": inputs, "teacher": {}, "pins": {}}
    storage.write_json(str(folder / "manifest.json"), manifest)
    storage.write_json(str(folder / "summary.json"), {"stages": stages})


def write_evaluation(file: Path) -> None:
    """Write an evaluation of three models on two tasks, by draws and by texts."""
    speeds = {"teacher": 200.0, "layers": 800.0, "a <b>table</b>": 20_000.0}
    costs = {name: Cost(10**7, 10**8, 0, 0, None, speed, None, 10**9, speed / 200) for name, speed in speeds.items()}
    drawn = {name: Result("accuracy", "draws", [y, y + 0.02]) for name, y in zip(speeds, (0.8, 0.78, 0.7), strict=True)}
    gold = ["a", "b"] * 20
    texts = {
        name: Result("accuracy", "texts", gold=gold, found=gold[:right] + ["c"] * (40 - right))
        for name, right in zip(speeds, (39, 35, 30), strict=True)
    }
    tasks = [
        TaskReport(f"{kind} task", "classification", kind, rows) for kind, rows in (("drawn", drawn), ("whole", texts))
    ]
    made = {"settings": {"seed": 0}}
    write_report(Evaluation(list(speeds), tasks, costs, made), str(file), plots=False)


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
