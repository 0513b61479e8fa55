"""Draw the README's picture: `python jobs/benchmarks/overview.py RUN STUDENT`.

From left to right: texts with one word, the teacher's embeddings of its occurrences in a corpus and in these texts, coloured by
sense, the senses with the words that stand near them, and what a student returns for the texts. RUN is the run folder of a
dictionary with its passages, STUDENT that of a student of it. The README's picture was made from the training contexts of
the word in CoarseWSD-20, with `--senses 4`, and from a `static` student of eight epochs.
"""

import argparse
import itertools
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import msense
from msense.cli.console import run_job
from msense.errors import InputError

OUTPUT = Path(__file__).parents[2] / ".github" / "images" / "overview.svg"
TEXTS = (
    "the festival is held each spring",
    "flowers of spring, summer and autumn",
    "the village has a mineral spring",
)
OCCURRENCES, NUMBERS, RARE = 300, 40, 5  # words in fewer contexts than RARE hardly count
SIZE, LEFT = (10.0, 4.15), (0.25, 2.5, 5.1, 7.75)  # inches; the columns
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito, which colour-blind people can distinguish
INK, PALE = "#24292f", "#57606a"
MONO = {"family": "DejaVu Sans Mono", "size": 10.5}
Values = dict[str, Any]


def measure(run: Path, student: Path, word: str, texts: Sequence[str]) -> Values:
    """Return what the picture shows, as JSON values."""
    dictionary, encoder = msense.SenseDictionary.load(run), msense.SenseEncoder.from_pretrained(student)
    match = dictionary.lookup(word)
    if not match.tokens or not (found := list(occurrences(run, word, match.tokens[0].token_id))):
        raise InputError(
            f"{match.explain()} The passages of {run} do not contain it as a word: give another with --word"
        )
    token = match.tokens[0].token_id
    if len(dictionary.senses(token).counts) > len(COLOURS):
        raise InputError(
            f"{word!r} has more than {len(COLOURS)} senses: build the dictionary with --senses {len(COLOURS)}"
        )
    contexts, ids = zip(*found, strict=True)
    points = embed(dictionary.config.teacher.name, ids, texts, token)
    senses = dictionary.assign(np.full(len(points), token), points).tolist()
    centre = points.mean(0)
    axes = np.linalg.svd(points - centre, full_matrices=False)[2][:2]
    vectors = np.asarray(encoder.encode(texts, normalize_embeddings=True))
    return {
        "word": word,
        "plane": ((points - centre) @ axes.T).round(2).tolist(),
        "senses": senses,
        "counts": dictionary.senses(token).counts.tolist(),
        "near": {
            sense: near_words(contexts, np.array(senses[: len(ids)]) == sense, word) for sense in range(len(COLOURS))
        },
        "texts": list(texts),
        "named": [[t.sense, t.probability] for text in texts for t in encoder.tokens(text) if t.token_id == token],
        "vectors": vectors[:, :NUMBERS].round(4).tolist(),
    }


def occurrences(run: Path, word: str, token: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the text and token ids of the first passages with a word."""
    tables = map(pq.read_table, sorted((run / "passages").glob("*.parquet")))
    rows = (row for table in tables for row in table.select(["text", "input_ids"]).to_pylist())
    found = (r for r in rows if token in r["input_ids"] and re.search(rf"\b{word}\b", r["text"]))
    for row in itertools.islice(found, OCCURRENCES):
        yield row["text"], row["input_ids"]


def near_words(contexts: Sequence[str], chosen: np.ndarray, word: str) -> list[str]:
    """Return words whose share of the chosen contexts is highest above their share of all, in contexts of the word."""
    windows = [text[max(0, at - 60) : at + 60] for text in contexts for at in [text.find(word)]]
    near = [set(re.findall("[a-z]{5,}", window)) - {word} for window in windows]
    every = Counter(itertools.chain(*near))
    own = Counter(itertools.chain(*(words for words, yes in zip(near, chosen, strict=True) if yes)))
    return sorted(own, key=lambda near: -own[near] / (every[near] + RARE))[:3]


def embed(teacher: str, ids: Sequence[list[int]], texts: Sequence[str], token: int) -> np.ndarray:
    """Return the teacher's embedding of a token's first occurrence in passages and in texts, float32 [n, D]."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from msense.teacher.files import body_folder

    folder = body_folder(teacher, None)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rows = [*ids, *tokenizer(list(texts))["input_ids"]]
    with torch.inference_mode():
        points = [model(torch.tensor([row])).last_hidden_state[0, row.index(token)] for row in rows]
    return torch.stack(points).numpy()


def draw(values: Values, output: Path) -> None:
    """Draw the picture into a file."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "msense", "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    figure = plt.figure(figsize=SIZE)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    page.axis("off")
    rounded = "round,pad=0,rounding_size=0.15"
    card = FancyBboxPatch((0.05, 0.05), SIZE[0] - 0.1, SIZE[1] - 0.1, rounded, facecolor="white", edgecolor="#d0d7de")
    page.add_patch(card)
    senses = sorted(map(int, values["near"]))
    colours = dict(zip(senses, COLOURS, strict=True))
    titles = ("Text", "Teacher", "Sense dictionary", "Student")
    notes = ("without labels", f"embeddings of “{values['word']}”", f"senses of “{values['word']}”", "sense and vector")
    for x, title, note in zip(LEFT, titles, notes, strict=True):
        page.text(x, 3.72, title, weight="bold", size=13)
        page.text(x, 3.46, note, size=10, color=PALE)
    for x in LEFT[1:]:
        page.annotate("", (x - 0.1, 1.75), (x - 0.36, 1.75), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.8})
    for number, text in enumerate(values["texts"]):
        sentence(page, LEFT[0], 2.95 - 1.02 * number, text, values["word"], INK)
        outputs(page, 2.95 - 1.02 * number, values, number, colours)
    for number, (sense, colour) in enumerate(colours.items()):
        y = 2.95 - 0.77 * number
        page.plot(LEFT[2] + 0.07, y + 0.01, "o", color=colour, ms=9)
        page.text(LEFT[2] + 0.22, y, f"{values['counts'][sense]:,} occurrences, near", va="center", size=10)
        page.text(LEFT[2] + 0.22, y - 0.25, ", ".join(values["near"][str(sense)]), va="center", size=9.3, color=PALE)
    left, bottom, width, height = LEFT[1], 0.3, 2.2, 2.95
    box = (left / SIZE[0], bottom / SIZE[1], width / SIZE[0], height / SIZE[1])
    scatter(figure.add_axes(box), values, colours)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, transparent=True, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)


def sentence(page: Any, x: float, y: float, text: str, word: str, colour: str) -> None:
    """Write a short text, whose word is bold and coloured."""
    for number, line in enumerate(textwrap.wrap(text, 19)):
        if word in line:
            before, _, after = line.partition(word)
            line, marked = before + " " * len(word) + after, " " * len(before) + word
            page.text(x, y - 0.23 * number, marked, MONO, va="center", color=colour, weight="bold")
        page.text(x, y - 0.23 * number, line, MONO, va="center", color=INK)


def scatter(axes: Any, values: Values, colours: dict[int, str]) -> None:
    """Draw the occurrences in the plane of the first principal axes; those in the texts are ringed."""
    plane, senses = np.array(values["plane"]), np.array(values["senses"])
    for sense, colour in colours.items():
        axes.scatter(*plane[senses == sense].T, s=14, color=colour, lw=0)
    own = len(values["texts"])
    axes.scatter(*plane[-own:].T, s=90, c=[colours[sense] for sense in senses[-own:]], edgecolors=INK, lw=1.5)
    axes.set(xticks=[], yticks=[], facecolor="#f6f8fa")
    axes.spines[:].set_visible(False)


def outputs(page: Any, y: float, values: Values, number: int, colours: dict[int, str]) -> None:
    """Draw what the student returns for one text: the sense of the word, and the sentence vector."""
    sense, probability = values["named"][number]
    page.plot(LEFT[3] + 0.07, y + 0.01, "o", color=colours[sense], ms=9)
    page.text(LEFT[3] + 0.22, y, f"probability {probability:.2f}", va="center", size=10)
    strip = np.array(values["vectors"][number])[None]
    edges = np.linspace(LEFT[3], LEFT[3] + 2.0, strip.shape[1] + 1), (y - 0.5, y - 0.26)
    page.pcolormesh(*edges, strip, cmap="PuOr", vmin=-0.12, vmax=0.12, zorder=3)


def main() -> None:
    """Measure, unless the file of values exists, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("student", type=Path, metavar="STUDENT")
    parser.add_argument("--word", default="spring")
    parser.add_argument("--texts", nargs=len(TEXTS), default=TEXTS, metavar="TEXT", help="texts with the word")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="svg or png")
    parser.add_argument(
        "--values", type=Path, metavar="FILE", help="JSON of the values: read if it exists, else written"
    )
    given = parser.parse_args()
    if given.values and given.values.exists():
        values = given.values.read_text(encoding="utf-8")
    else:
        values = json.dumps(measure(given.run, given.student, given.word, given.texts))
        if given.values:
            given.values.write_text(values, encoding="utf-8")
    draw(json.loads(values), given.output)


if __name__ == "__main__":
    sys.exit(run_job(main))
