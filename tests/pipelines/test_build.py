"""Whole builds: hand-known dictionaries, and the same bytes however and wherever the work runs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from faulty import Corpus

from msense import SenseDictionary
from msense.config.build import BuildConfig
from msense.errors import InputError
from msense.io.arrays import save_arrays
from msense.pipelines.build import build_dictionary
from msense.run.folder import RunFolder
from msense.runtime import LocalExecutor
from msense.stages import embedding_store
from msense.stages.cluster import clustering_memory
from msense.stages.passages import PassageStats

MakeTeacher = Callable[..., Path]
in_process = pytest.mark.usefixtures("in_process")

LINES = ["The bank of the River is deep...", "money is in the bank", "a cat sat on the mat, a dog sat near"]
LINES += ["the river runs full !"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(LINES * 3) + "\n")
    (folder / "b.txt").write_text("\n".join(reversed(LINES * 2)) + "\n")
    return folder


def build(output: Path, **settings: object) -> dict:
    return build_dictionary(BuildConfig(output=str(output), **{"local": True, **settings}))


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_two_workers_give_the_bytes_of_one(
    made: Corpus, kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Several partitions and two tokens that are clustered in chunks."""
    if kind == "ray":
        request.getfixturevalue("ray")
    monkeypatch.setattr(embedding_store, "PARTITION_BYTES", (150_000, 150_000))
    made.build("one", LocalExecutor(device="cpu", isolate=False))
    made.build("two", local=kind == "local", workers=2, keep=("occurrences", "centroids"))
    assert len(list((made.folder / "two" / "occurrences").glob("*.records"))) > 1
    assert len(list((made.folder / "two" / "centroids").glob("token-*.safetensors"))) >= 2
    assert made.files("two") == made.files("one")


@in_process
def test_hand_known_teacher_gives_its_embedding_table(tmp_path: Path, corpus: Path, make_teacher: MakeTeacher) -> None:
    """Layer 0 of the llama double is its embedding table: one sense a token, the token's row, counted exactly."""
    from transformers import AutoModel

    teacher = make_teacher("llama")
    summary = build(tmp_path / "run", corpus=(str(corpus),), teacher=str(teacher), layer=0, dtype="float32")
    dictionary = SenseDictionary.load(summary["dictionary"])
    table = AutoModel.from_pretrained(teacher).get_input_embeddings().weight.detach().numpy().astype(np.float16)
    (match,) = {t.token_id for t in dictionary.lookup("bank").tokens}
    senses = dictionary.senses(match)
    np.testing.assert_array_equal(senses.centroids, table[match : match + 1].astype(np.float32))
    assert senses.counts.tolist() == [10]  # twice in LINES, which is there five times
    assert dictionary.token_counts[match] == 10
    assert len(dictionary.senses(2).centroids) == 0  # BOS is an attention sink: no senses
    assert dictionary.token_counts[2] == 0
    assert summary["stages"]["passages"]["documents"] == 20


@in_process
def test_exemplars_show_the_word_in_its_document(tmp_path: Path, corpus: Path, make_teacher: MakeTeacher) -> None:
    build(tmp_path / "run", corpus=(str(corpus),), teacher=str(make_teacher("bert")), exemplars=2, senses=3)
    dictionary = SenseDictionary.load(tmp_path / "run" / "dictionary")
    token = dictionary.lookup("river").tokens[0].token_id
    rows = pq.read_table(tmp_path / "run" / "dictionary" / "exemplars.parquet").to_pylist()
    mine = [row for row in rows if row["token"] == token]
    assert {row["sense"] for row in mine} == set(range(len(dictionary.senses(token).counts)))
    assert max(row["rank"] for row in mine) == 1
    for row in mine:
        name, line = row["document_id"].split(":")
        text = (corpus / name).read_text().splitlines()[int(line)]
        assert row["word"] in ("river", "River")
        assert row["left"] + row["word"] + row["right"] == text
    assert [r["distance"] for r in mine if r["sense"] == 0] == sorted(r["distance"] for r in mine if r["sense"] == 0)


@in_process
def test_a_finished_run_is_kept_and_changes_are_refused(
    tmp_path: Path, corpus: Path, make_teacher: MakeTeacher
) -> None:
    settings = {"corpus": (str(corpus),), "teacher": str(make_teacher("bert"))}
    first = build(tmp_path / "run", **settings)
    again = build(tmp_path / "run", **settings)
    assert again["stages"] == first["stages"]
    with pytest.raises(InputError, match=r"config.senses: 'auto' before, 7 now[\s\S]*another --output"):
        build(tmp_path / "run", senses=7, **settings)
    with pytest.raises(InputError, match=r"teacher\.fingerprint"):
        build(tmp_path / "run", **settings | {"teacher": str(make_teacher("llama"))})
    with (corpus / "a.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(InputError, match=r"inputs.a.txt: '\d+ .* before"):
        build(tmp_path / "run", **settings)


@in_process
def test_a_dry_run_estimates_what_the_build_does(tmp_path: Path, corpus: Path, make_teacher: MakeTeacher) -> None:
    settings = {"corpus": (str(corpus),), "teacher": str(make_teacher("bert")), "max_occurrences": 5}
    estimate = build(tmp_path / "run", dry_run=True, **settings)["estimate"]
    assert not (tmp_path / "run" / "occurrences").exists()
    summary = build(tmp_path / "run", **settings)
    plan = summary["stages"]["plan"]
    assert (estimate["documents"], estimate["passages"], estimate["tokens"]) == (20, 20, plan["tokens"])
    assert (estimate["needed"], estimate["stored"]) == (plan["needed"], plan["stored"])
    assert estimate["senses"] >= summary["stages"]["dictionary"]["senses"]
    embedded = summary["stages"]["embed"]
    assert embedded["occurrences"] == estimate["stored"]
    assert (embedded["forwarded"], embedded["kept_bytes"]) == (estimate["kept_tokens"], estimate["embeddings_bytes"])
    assert estimate["budget_bytes"] > estimate["embeddings_bytes"]
    less = build(tmp_path / "less", dry_run=True, embeddings_budget="1KB", **settings)["estimate"]
    assert (less["kept_tokens"], less["reread_tokens"]) == (0, estimate["needed_tokens"])


def test_memory_of_clustering(tmp_path: Path) -> None:
    """A shard twice, or the chunks of a large token that a worker holds; with mcl a graph as well."""
    run = RunFolder(str(tmp_path))
    (tmp_path / "plan").mkdir()
    arrays = {"stored": np.array([10, 20, 9000, 40]), "shards": np.array([0, 2, 3, 4])}
    save_arrays(Path(run.thresholds), arrays)
    for given, expected in (
        ({"max_points_per_part": 9000}, 2 * 9000 * 28),
        ({"max_points_per_part": 1024}, 4 * 1024 * 24),
        ({"max_points_per_part": 5000}, 9000 * 24),
        ({"max_points_per_part": 9000, "senses": "mcl"}, 2 * 9000 * 28 + 22 * 4000**2),
    ):
        assert clustering_memory(run, BuildConfig(max_occurrences=0, **given), dim=4) == expected


@in_process
def test_a_sampled_dry_run_estimates_the_whole(made: Corpus) -> None:
    settings = {"dry_run": True, "max_occurrences": 200, "dedup": False}
    whole = made.build("all", time_teacher=True, **settings)["estimate"]
    part = made.build("part", sample=0.25, **settings)["estimate"]
    for name in ("documents", "tokens", "needed_tokens", "stored"):
        assert part[name] == pytest.approx(whole[name], rel=0.35), name
    assert whole["tokens_per_second"] > 0


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_with_the_real_teacher(tmp_path: Path) -> None:
    """Build from a few English sentences with MiniLM, without Ray, and show the result."""
    money = ["she paid money into the bank account", "the bank raised its rate", "he robbed a bank and its cash"]
    river = ["they sat on the bank of the river", "the muddy bank of the stream", "fish swim near the river bank"]
    rng = np.random.default_rng(0)
    lines = [f"{rng.choice(topic)} {number}" for topic in (money, river) for number in range(40)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    output = ["--output", str(tmp_path / "run"), "--senses", "2", "--local"]
    assert "80 documents" in run("jobs/build_dict.py", "--corpus", str(tmp_path / "text.txt"), *output)
    dictionary = SenseDictionary.load(tmp_path / "run")
    token = dictionary.lookup("bank").tokens[0].token_id
    assert dictionary.senses(token).counts.sum() == dictionary.token_counts[token] >= 80
    shown = run("-m", "msense", "show", str(tmp_path / "run"), "bank")
    assert len(shown.split("[bank]")) == 7  # two senses with three exemplars each
    senses: dict[bool, set[int]] = {True: set(), False: set()}
    for row in pq.read_table(tmp_path / "run" / "dictionary" / "exemplars.parquet").to_pylist():
        if row["token"] == token:
            senses[int(row["document_id"].split(":")[1]) < 40].add(row["sense"])
    assert not senses[True] & senses[False]  # the nearest occurrences of each sense are of one topic


def test_summaries_of_older_versions_are_read() -> None:
    old = {"documents": 3, "passages": 2, "tokens": 9, "bad documents": 1, "bad: empty": 1, "seconds": 0.1}
    stats = PassageStats.from_summary(old)
    assert stats == PassageStats(3, 2, 9, {"empty": 1})
    with pytest.raises(InputError, match="1 empty"):
        stats.check_bad_documents("fail")
