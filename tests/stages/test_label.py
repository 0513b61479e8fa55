"""Labels: planted truth, the same bytes for any division of work or interruption, and refusal of invalid input."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from driver import DrivenExecutor, Options
from executors import before, small_partitions, stop
from faulty import DAMAGES, WORDS, Corpus, MakeTeacher, Outcome, flip_a_byte
from tiny import make

from msense import SenseDictionary
from msense.cli.status import show_status
from msense.config.build import BuildConfig
from msense.dictionary import TeacherName, write_dictionary
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import open_parquet
from msense.run.folder import RunFolder
from msense.run.manifest import inputs_hash
from msense.stages import embedding_store, label_texts
from msense.teacher.model import Teacher
from msense.teacher.pooling import check_pooling, pool
from msense.teacher.spec import load_teacher_info
from msense.training.label_dataset import LabelSet

pytestmark = pytest.mark.usefixtures("in_process")
LINES = ["the bank of the river is deep", "money is in the bank", "a cat sat on the mat"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, make_teacher: MakeTeacher) -> Corpus:
    """A corpus with the dictionary "dict" and labels "run", unchanged by any test."""
    corpus = Corpus(tmp_path_factory.mktemp("labels"), make_teacher("bert"))
    with small_partitions():
        corpus.build("dict", max_occurrences=60)
        label(corpus, corpus.folder / "run")
    return corpus


@pytest.fixture
def run(shared: Corpus, tmp_path: Path) -> Path:
    """A run that has the labels of the run "run" and nothing else."""
    shutil.copytree(shared.folder / "run" / "labels", tmp_path / "run" / "labels")
    return tmp_path / "run"


def label(made: Corpus, output: Path, **settings: object) -> LabelSet:
    """Distill until the training begins; return the labels, which are in a folder of this student alone."""
    made.label(str(output), **{"soft_targets": 2, "held_out": 0.2, **settings})
    return LabelSet.open(str(output))


def folder(run: Path) -> Path:
    """Return the folder of the label files of a run."""
    (only,) = (run / "labels").iterdir()
    return only / "labels"


def files(run: Path) -> dict[str, bytes]:
    """Return the contents of the label files of a run."""
    return {path.name: path.read_bytes() for path in folder(run).iterdir() if path.suffix != ".done"}


def times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder(run).iterdir()}


def planted(folder: Path, teacher: Path) -> tuple[dict[str, int], np.ndarray]:
    """Write a dictionary of a teacher whose embeddings are a table: `bank` is its own second sense, `river` its first.

    Returns:
        The tokens' ids, and the table float32 [V, 16].
    """
    from transformers import AutoModel

    info, tokenizer = load_teacher_info(str(teacher), BuildConfig(layer=0))
    table = AutoModel.from_pretrained(teacher).get_input_embeddings().weight.detach().float().numpy()
    ids = tokenizer.get_vocab()
    far = np.full(16, 3.0, np.float32)
    bank, river = table[ids["bank"]], table[ids["river"]]
    senses = {ids["bank"]: [bank + far, bank], ids["river"]: [river, river - 2 * far, river + 0.25]}
    given = {"teacher": TeacherName(name=str(teacher), fingerprint=info.fingerprint), "layer": 0, "max_length": 64}
    given |= {"tokenizer_fingerprint": info.tokenizer_fingerprint, "excluded_token_ids": info.excluded}
    sizes = [len(senses.get(token, ())) for token in range(len(table))]
    d = make(sizes, 16, "float32", temperature_unit=2.0, pooling="mean", **given)
    rows = np.concatenate([senses[token] for token in sorted(senses)])
    write_dictionary(folder, d.config, d.offsets, d.counts, d.rms_distance, d.token_counts, [rows])
    return ids, table


def test_planted_senses_weights_and_pooled_embeddings(
    shared: Corpus, tmp_path: Path, make_teacher: MakeTeacher
) -> None:
    teacher = make_teacher("llama")
    ids, table = planted(tmp_path / "dictionary", teacher)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    given = {"dictionary": str(tmp_path / "dictionary"), "corpus": str(tmp_path / "text.txt"), "teacher": None}
    labels = label(shared, tmp_path / "run", **given, temperature=0.5, held_out=0)
    batch = labels.read(np.arange(3))
    words = [["<s>", *line.split()] for line in LINES]
    assert batch.ids[batch.mask].tolist() == [ids.get(word, 1) for line in words for word in line]
    assert batch.mask.sum(dim=1).tolist() == [len(line) for line in words]
    known = {"bank": 1, "river": 0}
    assert batch.senses[batch.mask].tolist() == [known.get(word, -1) for line in words for word in line]
    assert (batch.senses[~batch.mask] == -1).all()
    river = words[0].index("river")
    assert batch.soft_senses[0, river].tolist() == [0, 2]
    near = 1 / (1 + np.exp(-16 * 0.25**2 / (0.5 * 2.0)))  # squared distance 1 over temperature 0.5 x unit 2
    assert batch.soft_weights[0, river].tolist() == pytest.approx([near, 1 - near], abs=2e-3)
    assert batch.soft_senses[0, 1].tolist() == [-1, -1]
    assert batch.soft_weights[0, 1].tolist() == [0, 0]
    means = [table[[ids.get(word, 1) for word in line]].mean(axis=0) for line in words]
    np.testing.assert_allclose(batch.pooled.numpy(), means, atol=2e-3)
    assert labels.manifest.partitions[0].labelled == 3


def test_labels_are_what_the_dictionary_assigns(shared: Corpus) -> None:
    """Compare with the teacher run on each passage of the plan alone."""
    run = shared.folder / "run"
    labels, dictionary = LabelSet.open(str(run)), SenseDictionary.load(shared.folder / "dict")
    dtype = storage.read_json(RunFolder(str(run)).manifest)["pins"]["dtype"]
    teacher = Teacher(str(shared.teacher), revision=None, layer=-1, dtype=dtype, device="cpu")
    plan = storage.stats_of(str(shared.folder / "dict" / "plan" / "plan.safetensors"))
    assert len(labels.lengths) == plan["needed"] < plan["passages"]
    assert len(labels.manifest.partitions) >= 3
    wrong = 0
    for number in range(len(labels.lengths)):
        batch = labels.read(np.array([number]))
        hidden = teacher.embed(batch.ids.numpy(), batch.mask.numpy())
        wrong += int((dictionary.assign(batch.ids[0], hidden[0]) != batch.senses[0]).sum())
        np.testing.assert_allclose(pool(hidden, batch.mask, "mean", normalize=False), batch.pooled, atol=0.05)
    assert wrong <= 0.001 * labels.lengths.sum()  # rounding depends on the batch
    held = labels.held_out()
    assert 0 < len(held) < len(labels.lengths) / 2
    batches = list(labels.batches(0, 0, 500))
    assert sorted([*held.tolist(), *np.concatenate(batches).tolist()]) == list(range(len(labels.lengths)))
    assert all(len(batch) == 1 or len(batch) * labels.lengths[batch].max() <= 500 for batch in batches)


def test_whole_documents_are_held_out_and_train_tokens_limit_the_first_by_key(shared: Corpus, tmp_path: Path) -> None:
    """Passages of a long document share its flag; fewer tokens are a subset of more."""
    rng = np.random.default_rng(1)
    (tmp_path / "long.txt").write_text("\n".join(" ".join(rng.choice(WORDS, 200)) for _ in range(40)))
    given = {"corpus": (str(tmp_path / "long.txt"),), "held_out": 0.3, "soft_targets": 0}
    everything = label(shared, tmp_path / "all", **given, train_tokens=10**9)
    column = open_parquet(str(folder(tmp_path / "all").parent / "passages" / "000000.parquet")).read(
        columns=["document_id"]
    )
    documents = np.array(column.column("document_id").to_pylist())
    held = np.zeros(len(documents), dtype=bool)
    held[everything.held_out()] = True
    assert len(documents) == len(everything.lengths) > 120
    for document in set(documents):
        assert len(set(held[documents == document])) == 1
    assert 2 <= len(set(documents[held])) <= 25
    some = label(shared, tmp_path / "some", **given, train_tokens=3000)
    fewer = label(shared, tmp_path / "fewer", **given, train_tokens=1500)
    assert 1200 < fewer.manifest.total("tokens") <= 1500 < some.manifest.total("tokens") <= 3000

    def texts(labels: LabelSet) -> set[tuple[int, ...]]:
        return {tuple(labels.read(np.array([n])).ids[0].tolist()) for n in range(len(labels.lengths))}

    assert texts(fewer) < texts(some) < texts(everything)
    with pytest.raises(InputError, match=r"--train-tokens 3 is too small .*: set it to at least \d+"):
        label(shared, tmp_path / "none", **given, train_tokens=3)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_reshuffled_and_waste_little_padding() -> None:
    rng = np.random.default_rng(0)
    labels = object.__new__(LabelSet)  # without files
    labels.lengths, labels._held_out = rng.integers(5, 120, 20_000).astype(np.int32), np.zeros(20_000, bool)
    first, second, other = (list(labels.batches(*place, 8192)) for place in ((0, 0), (1, 0), (0, 1)))
    assert first[0].tolist() != second[0].tolist() != other[0].tolist()
    widths = np.array([int(labels.lengths[b].max()) for b in first])
    padded = sum(len(b) * width for b, width in zip(first, widths, strict=True))
    assert labels.lengths.sum() / padded > 0.95
    assert labels.lengths.sum() / 8192 / len(first) > 0.9  # batches are full
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.3  # not ordered by length


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_labels_made_on_ray_and_after_a_killed_worker_are_the_same(
    ray: None, made: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on Ray, one of which is killed while it writes a partition, against this process."""
    monkeypatch.setattr(embedding_store, "PARTITION_BYTES", (1, 1))  # one block per partition
    given = write_documents(made) | {"soft_targets": 2}
    made.build("dict", senses=3, max_occurrences=60)
    label(made, made.folder / "whole", **given)
    flag, log = made.folder / "flag", made.folder / "log"
    faults = {"labels": {"flag": flag, "at": "write_json"}}
    executor = DrivenExecutor(Options(log, faults), workers=2)
    monkeypatch.setattr(executor, "train", stop)
    made.label("run", executor, local=False, **given)
    assert flag.exists()
    assert files(made.folder / "run") == files(made.folder / "whole")
    partitions = len(list(folder(made.folder / "run").glob("0*.safetensors")))
    assert partitions >= 4
    begun = log.read_text().splitlines()
    assert sum(line.startswith("labels ") for line in begun) == partitions + 1
    assert not list((made.folder / "run").rglob(".*.part"))


@pytest.mark.parametrize("dtype", ["store", "int8"])
def test_labels_do_not_depend_on_what_was_kept(made: Corpus, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    """All embeddings kept, none, those of half the partitions; and with a damaged file. The teacher reads what is missing."""
    made.settings["embeddings_dtype"] = dtype
    whole = made.build("all", max_occurrences=60, keep_embeddings="all")["stages"]["embed"]
    stored = sum(path.stat().st_size for path in (made.folder / "all" / "embeddings").glob("*.embeddings"))
    passages = made.build("all", max_occurrences=60)["stages"]["plan"]["needed"]
    assert stored == whole["kept_bytes"] == whole["forwarded"] * (20 if dtype == "int8" else 32) + passages * 32
    kept = {"none": {"keep_embeddings": "sample"}, "half": {"embeddings_budget": whole["kept_bytes"] // 2}}
    for name, settings in kept.items():
        assert made.build(name, max_occurrences=60, **settings)["stages"]["embed"]["forwarded"] == whole["forwarded"]
        assert made.files(name) == made.files("all")
    sizes = {name: len(list((made.folder / name).glob("embeddings/*.embeddings"))) for name in ("all", "half", "none")}
    assert 1 <= sizes["half"] < sizes["all"]
    assert sizes["none"] == 0
    flip_a_byte(
        Path(shutil.copytree(made.folder / "all", made.folder / "damaged")) / "embeddings" / "000000.embeddings"
    )
    everything = {}
    for tokens in (None, 100, 5000):
        forwarded = {}
        for name in ("all", "half", "none", "damaged"):
            output = made.folder / f"labels-{name}-{tokens}"
            label(made, output, dictionary=str(made.folder / name), train_tokens=tokens)
            everything[name, tokens] = files(output)
            stages = storage.read_json(str(folder(output).parent / "summary.json"))["stages"]
            forwarded[name] = stages["labels"]["forwarded"]
            assert everything[name, tokens] == everything["all", tokens]
        if tokens == 100:  # batches without a chosen passage are not read
            assert 0 == forwarded["all"] < forwarded["none"] < whole["forwarded"]
            continue
        assert forwarded["all"] < forwarded["half"] < forwarded["none"]
        assert forwarded["all"] < forwarded["damaged"] < forwarded["none"]
        assert (forwarded["all"] == 0) == (tokens is None)  # else more than the plan needs
    assert "000000.embeddings is missing or corrupted" in caplog.text


# --- spans ------------------------------------------------------------------------------------------------------------


def write_documents(made: Corpus) -> dict[str, object]:
    """Write documents of a title and several sentences, and queries; return the settings of builds and distillations."""
    rng, lines = np.random.default_rng(2), []
    for _ in range(60):
        sentences = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) + rng.choice([".", " !"]) for _ in range(8)]
        lines.append(json.dumps({"text": "\n".join([" ".join(rng.choice(WORDS, 4)), " ".join(sentences)])}))
    lines += [
        json.dumps({"text": f"{first} ran fast. {second} slept."}) for first in WORDS[-5:] for second in WORDS[-5:]
    ]
    (made.folder / "a.jsonl").write_text("\n".join(lines))
    (made.folder / "queries.txt").write_text("\n".join(["the bank", "a cat near the river ?", "the mat " * 99] * 9))
    made.settings |= {"corpus": (str(made.folder / "a.jsonl"),), "dedup": False}
    return {"queries": (str(made.folder / "queries.txt"),), "held_out": 0.3}


def contains(whole: list[int], part: list[int]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


def test_spans_and_queries_are_read_once_as_texts_of_their_own(made: Corpus) -> None:
    given = write_documents(made)
    read = made.build("dict", max_occurrences=60)["stages"]["embed"]["forwarded"]
    made.build("none", max_occurrences=60, keep_embeddings="sample")
    labels = label(made, made.folder / "first", **given)
    stages = made.distill(
        "second", labels=str(made.folder / "first" / "labels"), soft_targets=2, student="static", **given
    )
    assert stages["stages"]["labels"]["forwarded"] == 0
    summary = storage.read_json(str(folder(made.folder / "first").parent / "summary.json"))["stages"]["labels"]
    assert read + summary["forwarded"] <= 1.1 * labels.lengths.sum()  # by the build and both distillations
    label(made, made.folder / "again", dictionary=str(made.folder / "none"), **given)
    assert files(made.folder / "again") == files(made.folder / "first")

    rows = [labels.read(np.array([row])) for row in range(len(labels.lengths))]
    ids, held = [row.ids[0].tolist() for row in rows], np.isin(np.arange(len(rows)), labels.held_out())
    counts = np.bincount(labels.kinds)
    assert (labels.lengths[labels.kinds == 0] < 16).sum() > 10
    assert counts[4] == 27
    assert min(counts) > 20
    assert labels.lengths[(labels.kinds > 0) & (labels.kinds < 4)].min() == 5  # three without [CLS] and [SEP]
    assert labels.lengths[labels.kinds == 4].max() == 64
    assert 0 < held[labels.kinds == 4].sum() < 27
    for row in np.flatnonzero((labels.kinds > 0) & (labels.kinds < 4)):
        of = [number for number in np.flatnonzero(labels.kinds == 0) if contains(ids[number], ids[row][1:-1])]
        assert held[row] in held[of]
        assert max(labels.lengths[of]) >= 32 + 2  # shorter passages have no spans
        assert ids[row] not in [ids[number] for number in of]
    teacher = Teacher(str(made.teacher), revision=None, layer=-1, dtype="float32", device="cpu")
    for number in np.flatnonzero(labels.kinds)[::10]:
        hidden = teacher.embed(rows[number].ids.numpy(), rows[number].mask.numpy())
        np.testing.assert_allclose(
            pool(hidden, rows[number].mask, "mean", normalize=False), rows[number].pooled, atol=0.01
        )
    fewer = label(made, made.folder / "fewer", **given, spans={"run": 0.3})
    assert np.bincount(fewer.kinds)[1:4].tolist() == [0, int((fewer.kinds == 2).sum()), 0]
    assert 0 < (fewer.kinds == 2).sum() < (labels.kinds == 2).sum()


@pytest.mark.parametrize("prompt", ["", "the river "])
def test_spans_are_of_passages_with_32_tokens_of_their_own(made: Corpus, prompt: str) -> None:
    rng, room = np.random.default_rng(3), 64 - 2 - len(prompt.split())
    lines, last = [], {}
    for tokens in (30, 31, 32, 33, room + 31, room + 32):  # the last two: a second passage, after 8 tokens of context
        parts = [" ".join(rng.choice(WORDS[:-5], count - 1)) + "." for count in (tokens - 11, 11)]
        lines.append(" ".join(parts))
        last[tokens] = parts[1]
    (made.folder / "a.txt").write_text("\n".join(lines))
    made.build("dict", corpus=(str(made.folder / "a.txt"),), max_occurrences=60, prompt=prompt, stride=8, dedup=False)
    labels = label(made, made.folder / "run", spans={"sentence": 1})
    spans = [labels.read(np.array([row])).ids[0].tolist() for row in np.flatnonzero(labels.kinds)]
    tokenizer = load_teacher_info(str(made.teacher), BuildConfig())[1]
    ids = {tokens: tokenizer.encode(text, add_special_tokens=False).ids for tokens, text in last.items()}
    assert all(len(own) == 11 for own in ids.values())
    found = [tokens for tokens, own in ids.items() if any(contains(span, own) for span in spans)]
    assert found == [32, 33, room + 32]
    made.build("short", max_occurrences=60, max_length=15)
    with pytest.raises(InputError, match="at most 13 tokens of text, and spans are taken of passages of 32 or more"):
        label(made, made.folder / "none", dictionary=str(made.folder / "short"), spans={"run": 1})


def test_a_dry_run_estimates_spans_and_old_dictionaries_are_read_again(made: Corpus) -> None:
    given = write_documents(made)
    made.build("dict", max_occurrences=60)
    estimate = made.distill("dry", dry_run=True, **given)["estimate"]
    labels = label(made, made.folder / "run", **given, soft_targets=0)
    for number, name in enumerate(("sentence", "run", "title"), 1):
        assert estimate["kinds"][name]["spans"] == pytest.approx((labels.kinds == number).sum(), rel=0.2)
        assert estimate["kinds"][name]["tokens"] == pytest.approx(labels.lengths[labels.kinds == number].sum(), rel=0.2)
    assert estimate["forwarded"] == sum(kind["tokens"] for kind in estimate["kinds"].values())
    run = RunFolder(str(made.folder / "dict"))
    manifest = storage.read_json(run.manifest)
    storage.write_json(run.manifest, {**manifest, "pins": {**manifest["pins"], "stages": 2}})  # passages have no text
    label(made, made.folder / "again", **given, soft_targets=0)
    assert (folder(made.folder / "again").parent / "passages").exists()
    assert files(made.folder / "again") == files(made.folder / "run")
    label(made, made.folder / "none", **given, spans={})
    assert not (folder(made.folder / "none").parent / "passages").exists()


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_students_share_labels_below_the_dictionary(
    made: Corpus, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.build("dict", max_occurrences=60)
    caplog.set_level("INFO")
    given = {"labels": None, "student": "static", "epochs": 1}
    refused: list[str] = []

    def meanwhile() -> None:
        with pytest.raises(
            InputError, match=rf"another driver .*dict/labels/.* \(process {os.getpid()} on .* --labels"
        ):
            made.distill("second", **given)
        refused.append("second")

    first = made.distill("first", before("labels", meanwhile), **given)
    assert refused == ["second"]
    assert Path(first["labels"]).parent == made.folder / "dict" / "labels"
    second = made.distill("second", **given, seed=1)
    assert "are finished: nothing is read by the teacher" in caplog.text
    assert second["labels"] == first["labels"]
    assert second["stages"]["labels"] | {"seconds": 0} == first["stages"]["labels"] | {"seconds": 0}
    monkeypatch.setenv("COLUMNS", "300")
    show_status(first["labels"])
    assert " 102 passages and 0 spans and queries" in capsys.readouterr().out


def test_labels_inside_a_student_of_an_older_version_are_used(made: Corpus) -> None:
    from safetensors.numpy import load_file, save_file

    made.build("dict", max_occurrences=60)
    whole = made.distill("run", spans={}, student="static", epochs=1)
    labels, run = Path(whole["labels"]), RunFolder(str(made.folder / "run"))
    manifest = storage.read_json(run.manifest)
    manifest["config"].pop("spans")
    manifest["pins"]["stages"] = 2
    storage.write_json(run.manifest, manifest)
    old = RunFolder(run.root, inputs_hash(manifest))
    content = storage.read_json(str(labels / "labels" / "labels.json")) | {"made_of": old.inputs_hash}
    content.pop("spans")
    for number, partition in enumerate(content["units"]):
        columns = load_file(labels / "labels" / f"{number:06d}.safetensors")
        assert not columns.pop("kind").any()
        old.publish(old.label_file(number), partial(save_file, columns))
        partition.pop("spans")
        partition |= {
            "size": os.stat(old.label_file(number)).st_size,
            "sha256": storage.sha256_of(old.label_file(number)),
        }
    old.publish(old.label_senses, partial(shutil.copy, labels / "labels" / "senses.safetensors"))
    storage.write_json(old.label_manifest, content)
    shutil.rmtree(labels)
    storage.remove(run.labels_place)
    assert not LabelSet.open(run.root, verify=True).kinds.any()
    made.distill("run", student="static", epochs=1)
    assert storage.read_json(run.manifest) == manifest
    assert (made.folder / "run" / "labels" / "labels.json").exists()
    with pytest.raises(InputError, match=r"training\.lr: "):
        made.distill("run", student="static", epochs=1, lr=0.5)


def test_a_finished_student_of_an_older_version_keeps_its_labels(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    made.build("dict", max_occurrences=60)
    given = {"student": "static", "epochs": 1, "spans": {}}
    with monkeypatch.context() as patch:
        patch.setattr("msense.pipelines.job.STAGES_VERSION", 3)
        first = made.distill("run", **given)
    written = {path: path.stat().st_mtime_ns for path in (made.folder / "run").rglob("*.safetensors")}
    again = made.distill("run", **given)
    assert (again["labels"], again["student"]) == (first["labels"], first["student"])
    assert {path: path.stat().st_mtime_ns for path in (made.folder / "run").rglob("*.safetensors")} == written
    assert made.distill("other", labels=str(made.folder / "run" / "labels"), **given)["labels"] != first["labels"]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", DAMAGES)
@pytest.mark.parametrize("name", ["000001.safetensors", "senses.safetensors", "labels.json"])
def test_a_corrupted_file_is_refused_and_regenerated(
    shared: Corpus, run: Path, name: str, fault: str, outcome: Outcome
) -> None:
    undamaged = files(run)
    DAMAGES[fault](folder(run) / name)
    if (fault, name) != ("byte flipped", "senses.safetensors"):  # its only checksum is in the marker
        with pytest.raises(InputError, match="`msense distill`"):
            LabelSet.open(str(folder(run).parent), verify=True)
    label(shared, run)
    assert files(run) == undamaged
    outcome(fault, "labels", "regenerated")


def test_invalid_values_are_refused(run: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder(run) / "000000.safetensors"
    good = load_file(path)

    def refuses(columns: dict, message: str) -> None:
        save_file(columns, path)
        with pytest.raises(InputError, match=rf"labels in .*000000.* are corrupted \(.*{message}.*regenerate"):
            LabelSet.open(str(path.parents[1])).read(np.array([0]))

    for name, value, message in [
        ("ids", 60_000, "outside the vocabulary of 25"),
        ("ids", -1, "outside"),
        ("senses", 60_000, "does not have"),
        ("soft_senses", 60_000, "does not have"),
        ("soft_weights", np.nan, "sum to 1"),
        ("soft_weights", 2, "sum to 1"),
        ("soft_weights", -1, "negative"),
        ("pooled", np.inf, "NaN or infinite"),
        ("offsets", 10**6, "do not increase"),
        ("held_out", 7, "held-out flags"),
        ("kind", 5, "unknown kind"),
    ]:
        changed = good[name].copy()
        changed.reshape(-1)[1 if name == "offsets" else 0] = value
        refuses({**good, name: changed}, message)
    refuses({**good, "more": good["ids"]}, "tensor more is .*, not None")
    refuses({**good, "ids": good["ids"].astype(np.int64)}, r"tensor ids is \('I64', .*, not \('I32', ")
    save_file(good, path)
    labels = LabelSet.open(str(path.parents[1]))
    for numbers in ([], [-1], [len(labels.lengths)]):
        with pytest.raises(InputError, match="no passages, or a number outside"):
            labels.read(np.array(numbers, np.int64))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_settings_may_change_until_the_student_is_finished(shared: Corpus, run: Path) -> None:
    made_at = times(run)
    label(shared, run, lr=1e-3)
    assert times(run) == made_at
    label(shared, run, held_out=0.1)
    assert len(list((run / "labels").iterdir())) == 2  # those of other settings are in a folder of their own
    (run / "student").mkdir()
    for name, then, now in (("soft_targets", "2", 3), ("held_out", r"0\.1", 0.3), ("pooled", "True", False)):
        with pytest.raises(InputError, match=rf"config\.{name}: {then} .*{now} [\s\S]*another --output"):
            label(shared, run, **{"held_out": 0.1, name: now})
    with pytest.raises(InputError, match=r"training\.lr: None .*0\.002 "):
        label(shared, run, held_out=0.1, lr=2e-3)
    with pytest.raises(InputError, match=r"dict is the run folder of a dictionary: .*another --output"):
        label(shared, shared.folder / "dict")
    with pytest.raises(InputError, match="is the run folder of a student"):
        shared.build(str(run))
    with pytest.raises(InputError, match="is the run folder of labels"):
        shared.distill(str(next((run / "labels").iterdir())))


def test_the_text_is_read_again_if_the_run_does_not_keep_it(made: Corpus) -> None:
    """Labels are the same with and without the dictionary's own passages; a missing or changed text is refused."""
    made.build("dict", max_occurrences=60)
    kept, others, again = (made.folder / name for name in ("kept", "others", "again"))
    label(made, kept)
    assert not (folder(kept).parent / "passages").exists()
    finished = made.folder / "dict" / "finished.json"
    original = finished.read_text()
    storage.write_json(str(finished), {**(storage.read_json(str(finished)) or {}), "made_of": "other inputs"})
    label(made, others)
    assert (folder(others).parent / "passages").exists()
    finished.write_text(original)
    flip_a_byte(made.folder / "dict" / "passages" / "000000.parquet")
    label(made, again)
    assert (folder(again).parent / "passages").exists()
    assert files(again) == files(others) == files(kept)
    assert (made.folder / "dict" / "passages" / "000000.parquet").exists()  # nothing of another run is removed
    shutil.rmtree(made.folder / "dict" / "passages")
    with (made.folder / "corpus" / "a.txt").open("a") as file:
        file.write("the bank\n")
    with pytest.raises(InputError, match=r"no passages, .* text .* changed[\s\S]*--corpus"):
        label(made, made.folder / "changed")
    shutil.rmtree(made.folder / "corpus")
    with pytest.raises(InputError, match=r"no passages, .* text [\s\S]*--corpus"):
        label(made, made.folder / "gone")


def test_dictionary_and_teacher_that_do_not_fit_are_refused(
    shared: Corpus, tmp_path: Path, make_teacher: MakeTeacher
) -> None:
    def refuses(message: str, **given: object) -> None:
        with pytest.raises(InputError, match=message):
            label(shared, tmp_path / "run", **given)

    refuses(r"no dictionary at .*none", dictionary=str(tmp_path / "none"))
    moved = shutil.copytree(shared.folder / "dict", tmp_path / "moved")
    label(shared, tmp_path / "found", dictionary=str(moved), teacher=None)  # where the run remembers it
    (moved / "teacher.json").write_text('{"folder": "/no/longer/there"}')
    refuses(r"teacher 'teacher'[\s\S]*--teacher", dictionary=str(moved), teacher=None)
    refuses("is not the one .*the dictionary has tokenizer", teacher=str(make_teacher("llama")))
    alone = shutil.copytree(shared.folder / "dict" / "dictionary", tmp_path / "alone")
    refuses(r"no text: .*alone' .*--corpus", dictionary=str(alone))
    beside = label(shared, tmp_path / "run", dictionary=str(shared.folder / "dict" / "dictionary"))
    assert beside.manifest.dictionary == SenseDictionary.load(alone).fingerprint
    with pytest.raises(InputError, match=r"has no finished labels"):
        LabelSet.open(str(shared.folder / "dict"))
    with pytest.raises(InputError, match=r"'max'.*--no-pooled"):
        check_pooling("max")


def test_dry_run_and_status(
    shared: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, given = tmp_path / "run", {"soft_targets": 2, "held_out": 0.2}
    with monkeypatch.context() as patch:
        patch.setattr(
            embedding_store, "PARTITION_BYTES", (60_000, 60_000)
        )  # several batches per partition, to be timed
        timed = shared.distill(str(run), dry_run=True, time_teacher=True, **given)["estimate"]
    assert timed["tokens_per_second"] > 0
    estimate = shared.distill(str(run), dry_run=True, **given)["estimate"]
    assert not list((run / "labels").rglob("*.safetensors"))
    assert estimate["forwarded"] == 0
    manifest = label(shared, run).manifest
    size = sum(partition.size for partition in manifest.partitions)
    assert estimate["total_bytes"] <= size <= estimate["total_bytes"] + 1000 * estimate["units"]  # headers
    assert (estimate["passages"], estimate["tokens"]) == (manifest.total("passages"), manifest.total("tokens"))
    assert estimate["pooled_bytes"] == 32 * estimate["passages"]
    monkeypatch.setenv("COLUMNS", "300")
    show_status(str(run))
    shown = capsys.readouterr().out
    assert f"{len(manifest.partitions)} of {len(manifest.partitions)} " in shown
    assert f"{manifest.total('tokens'):,} tokens" in shown
    assert "held out" in shown


WORDS_OF_ONE = " ".join(LINES) + " "


@pytest.mark.parametrize(
    ("lines", "share", "by", "held"),
    [
        ([WORDS_OF_ONE * 80], 0.2, "passages", (0.05, 0.5)),  # a book in a line
        ([WORDS_OF_ONE * 80, *LINES * 4], 0.2, "passages", (0.05, 0.5)),  # most of the text in one document
        (LINES * 40, 0.2, "documents", (0.06, 0.6)),
        (LINES, 0, "documents", (0, 0)),
    ],
    ids=["one document", "one long document", "many documents", "none wanted"],
)
def test_the_held_out_share_is_of_the_text(
    shared: Corpus, tmp_path: Path, lines: list[str], share: float, by: str, held: tuple[float, float]
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(lines))
    labels = label(shared, tmp_path / "run", corpus=str(tmp_path / "text.txt"), held_out=share, train_tokens=10**6)
    assert labels.manifest.held_out_by == by
    assert held[0] <= labels.lengths[labels.held_out()].sum() / labels.lengths.sum() <= held[1]


def test_text_that_would_all_be_held_out_is_refused_and_too_little_is_warned_of(
    shared: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match=r"--held-out 0\.5 leaves nothing of this text to train on"):
        label_texts._choose_held_out([0, 9], 9, 0.5)
    assert label_texts._choose_held_out([9, 4], 9, 0.5) == "passages"
    (tmp_path / "text.txt").write_text("the bank\n")
    caplog.set_level("WARNING")
    label(shared, tmp_path / "one", corpus=str(tmp_path / "text.txt"), held_out=0.001, train_tokens=10**6)
    assert "no passage is held out" in caplog.text


@pytest.mark.parametrize(("tokens", "bins"), [(9, 1), (10, 2), (14, 2), (15, 3)])
def test_bins_that_fill_the_wanted_tokens_exactly_are_read(tokens: int, bins: int) -> None:
    counts = np.array([5, 5, 5], np.int64)
    assert label_texts._last_key(counts, tokens) == (bins << (64 - label_texts.KEY_BINS_BITS)) - 1
