"""Labels: planted truth, the same bytes for any division of work or interruption, and refusal of invalid input."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from driver import DrivenExecutor, Options
from executors import small_partitions, stop
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
from msense.stages import label as label_module
from msense.teacher.model import Teacher
from msense.teacher.pooling import check_pooling, pool
from msense.teacher.spec import load_teacher_info
from msense.training.label_dataset import LabelSet

pytestmark = pytest.mark.usefixtures("in_process")
LABELS = ("labels", False)  # files without their markers
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
    """A copy of the run "run"."""
    return Path(shutil.copytree(shared.folder / "run", tmp_path / "run"))


def label(made: Corpus, output: Path, **settings: object) -> LabelSet:
    """Distill until the training begins; return the labels."""
    made.label(str(output), **{"soft_targets": 2, "held_out": 0.2, **settings})
    return LabelSet.open(str(output))


def times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (run / "labels").iterdir()}


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
    column = open_parquet(str(tmp_path / "all" / "passages" / "000000.parquet")).read(columns=["document_id"])
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
    made.build("dict", senses=3, max_occurrences=60)
    monkeypatch.setattr(label_module, "PARTITION_BYTES", (1, 1))  # one block per partition
    label(made, made.folder / "whole")
    flag, log = made.folder / "flag", made.folder / "log"
    faults = {"labels": {"flag": flag, "at": "write_json"}}
    executor = DrivenExecutor(Options(log, faults), workers=2)
    monkeypatch.setattr(executor, "train", stop)
    made.label("run", executor, local=False, soft_targets=2, held_out=0.2)
    assert flag.exists()
    assert made.files("run", *LABELS) == made.files("whole", *LABELS)
    partitions = len(list((made.folder / "run" / "labels").glob("0*.safetensors")))
    assert partitions >= 5
    begun = log.read_text().splitlines()
    assert sum(line.startswith("labels ") for line in begun) == partitions + 1
    assert not list((made.folder / "run").rglob(".*.part"))


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", DAMAGES)
@pytest.mark.parametrize("name", ["000001.safetensors", "senses.safetensors", "labels.json"])
def test_a_corrupted_file_is_refused_and_regenerated(
    shared: Corpus, run: Path, name: str, fault: str, outcome: Outcome
) -> None:
    before = shared.files(run, *LABELS)
    DAMAGES[fault](run / "labels" / name)
    if (fault, name) != ("byte flipped", "senses.safetensors"):  # its only checksum is in the marker
        with pytest.raises(InputError, match=r"jobs/distill\.py"):
            LabelSet.open(str(run), verify=True)
    label(shared, run)
    assert shared.files(run, *LABELS) == before
    outcome(fault, "labels", "regenerated")


def test_invalid_values_are_refused(run: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = run / "labels" / "000000.safetensors"
    good = load_file(path)

    def refuses(columns: dict, message: str) -> None:
        save_file(columns, path)
        with pytest.raises(InputError, match=rf"labels in .*000000.* are corrupted \(.*{message}.*regenerate"):
            LabelSet.open(str(run)).read(np.array([0]))

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
    ]:
        changed = good[name].copy()
        changed.reshape(-1)[1 if name == "offsets" else 0] = value
        refuses({**good, name: changed}, message)
    refuses({**good, "more": good["ids"]}, "tensor more is .*, not None")
    refuses({**good, "ids": good["ids"].astype(np.int64)}, r"tensor ids is \('I64', .*, not \('I32', ")
    save_file(good, path)
    labels = LabelSet.open(str(run))
    for numbers in ([], [-1], [len(labels.lengths)]):
        with pytest.raises(InputError, match="no passages, or a number outside"):
            labels.read(np.array(numbers, np.int64))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_changed_settings_are_refused_by_name_but_labels_serve_another_training(shared: Corpus, run: Path) -> None:
    for name, then, now in (("soft_targets", "2", 3), ("held_out", r"0\.2", 0.1), ("pooled", "True", False)):
        with pytest.raises(InputError, match=rf"config\.{name}: {then} .*{now} [\s\S]*another --output"):
            label(shared, run, **{name: now})
    before = times(run)
    label(shared, run, lr=1e-3)  # nothing has been trained yet
    (run / "student").mkdir()
    with pytest.raises(InputError, match=r"training\.lr: 0\.001 .*0\.002 "):
        label(shared, run, lr=2e-3)
    assert times(run) == before
    with pytest.raises(InputError, match=r"dict is the run folder of a dictionary: .*another --output"):
        label(shared, shared.folder / "dict")
    with pytest.raises(InputError, match="is the run folder of a distillation"):
        shared.build(str(run))


def test_the_text_is_read_again_if_the_run_does_not_keep_it(made: Corpus) -> None:
    """Labels are the same with and without the dictionary's own passages; a missing or changed text is refused."""
    made.build("dict", max_occurrences=60)
    label(made, made.folder / "kept")
    assert not (made.folder / "kept" / "passages").exists()
    finished = made.folder / "dict" / "finished.json"
    original = finished.read_text()
    storage.write_json(str(finished), {**(storage.read_json(str(finished)) or {}), "made_of": "other inputs"})
    label(made, made.folder / "others")
    assert (made.folder / "others" / "passages").exists()
    finished.write_text(original)
    flip_a_byte(made.folder / "dict" / "passages" / "000000.parquet")
    label(made, made.folder / "again")
    assert (made.folder / "again" / "passages").exists()
    assert made.files("again", *LABELS) == made.files("kept", *LABELS)
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
    monkeypatch.setattr(label_module, "PARTITION_BYTES", (60_000, 60_000))  # several batches per partition, to be timed
    run, given = tmp_path / "run", {"soft_targets": 2, "held_out": 0.2}
    estimate = shared.distill(str(run), dry_run=True, time_teacher=True, **given)["estimate"]
    assert not (run / "labels" / "000000.safetensors").exists()
    manifest = label(shared, run).manifest
    size = sum(partition.size for partition in manifest.partitions)
    assert estimate["total_bytes"] <= size <= estimate["total_bytes"] + 1000 * estimate["units"]  # headers
    assert (estimate["passages"], estimate["tokens"]) == (manifest.total("passages"), manifest.total("tokens"))
    assert estimate["pooled_bytes"] == 32 * estimate["passages"]
    assert estimate["tokens_per_second"] > 0
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
        label_module._choose_held_out([0, 9], 9, 0.5)
    assert label_module._choose_held_out([9, 4], 9, 0.5) == "passages"
    (tmp_path / "text.txt").write_text("the bank\n")
    caplog.set_level("WARNING")
    label(shared, tmp_path / "one", corpus=str(tmp_path / "text.txt"), held_out=0.001, train_tokens=10**6)
    assert "no passage is held out" in caplog.text


@pytest.mark.parametrize(("tokens", "bins"), [(9, 1), (10, 2), (14, 2), (15, 3)])
def test_bins_that_fill_the_wanted_tokens_exactly_are_read(tokens: int, bins: int) -> None:
    counts = np.array([5, 5, 5], np.int64)
    assert label_module._last_key(counts, tokens) == (bins << (64 - label_module.KEY_BINS_BITS)) - 1
