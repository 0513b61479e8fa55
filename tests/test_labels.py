"""Labels: planted truth, the same bytes however the work is cut or cut off, and what is refused by name."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import driver
import numpy as np
import pytest
import torch
from faulty import WORDS, Corpus, Outcome, flip_a_byte
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kills import killed_once

from msense import SenseDictionary, distill_run, storage
from msense import labels as labels_module
from msense.config import BuildConfig
from msense.dictionary import DictionaryConfig, TeacherName, write_dictionary
from msense.distill_config import DistillConfig
from msense.distill_run import distill_student
from msense.errors import BadInput
from msense.label_set import LabelSet
from msense.pooling import pool
from msense.run_folder import RunFolder
from msense.status import show_status
from msense.teacher import Teacher, describe
from msense.tokens import open_parquet

MakeTeacher = Callable[..., Path]
without_ray = pytest.mark.usefixtures("in_process", "untrained")
LINES = ["the bank of the river is deep", "money is in the bank", "a cat sat on the mat"]


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that does nothing."""
    monkeypatch.setattr(distill_run, "train", lambda *_: {})


def distill(output: Path, **given: object) -> LabelSet:
    distill_student(DistillConfig(output=str(output), **given))
    return LabelSet.open(str(output))


def all_bytes(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "labels").iterdir()) if p.suffix != ".done"}


def planted(folder: Path, teacher: Path) -> tuple[dict[str, int], np.ndarray]:
    """Write a dictionary of a teacher whose embeddings are a table: `bank` is its own second sense, `river` its first.

    Returns:
        The tokens' ids, and the table float32 [V, 16].
    """
    from transformers import AutoModel

    info, tokenizer = describe(str(teacher), BuildConfig(layer=0))
    table = AutoModel.from_pretrained(teacher).get_input_embeddings().weight.detach().float().numpy()
    ids = tokenizer.get_vocab()
    far = np.full(16, 3.0, np.float32)
    senses = {ids["bank"]: [table[ids["bank"]] + far, table[ids["bank"]]], ids["river"]: [table[ids["river"]]]}
    senses[ids["river"]] += [table[ids["river"]] - 2 * far, table[ids["river"]] + 0.25]
    sizes = np.array([len(senses.get(token, ())) for token in range(len(table))])
    config = DictionaryConfig(
        teacher=TeacherName(name=str(teacher), fingerprint=info.fingerprint),
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        layer=0, dim=16, vocab_size=len(table), senses=3, dtype="float32", temperature_unit=2.0,
        excluded_token_ids=info.excluded, pooling="mean", max_length=64, max_occurrences=100,
    )  # fmt: skip
    rows = np.concatenate([senses[token] for token in sorted(senses)])
    offsets, ones = np.cumsum([0, *sizes]), np.ones(len(rows))
    write_dictionary(folder, config, offsets, ones, ones, np.ones(len(table)), [rows])
    return ids, table


@without_ray
def test_planted_senses_weights_and_pooled_embeddings(tmp_path: Path, make_teacher: MakeTeacher) -> None:
    teacher = make_teacher("llama")
    ids, table = planted(tmp_path / "dictionary", teacher)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    given = {"dictionary": str(tmp_path / "dictionary"), "corpus": str(tmp_path / "text.txt"), "dtype": "float32"}
    labels = distill(tmp_path / "run", **given, soft_targets=2, temperature=0.5, held_out=0)
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
    assert labels.manifest.units[0].labelled == 3


@without_ray
def test_labels_are_what_the_dictionary_assigns(made: Corpus) -> None:
    """Each passage of the plan, read by the teacher alone."""
    made.build("dict", max_occurrences=40)
    labels = distill(made.folder / "run", dictionary=str(made.folder / "dict"), teacher=str(made.teacher), held_out=0.2)
    dictionary = SenseDictionary.load(made.folder / "dict")
    teacher = Teacher(str(made.teacher), revision=None, layer=-1, dtype=_dtype(made.folder / "run"), device="cpu")
    plan = storage.facts_of(str(made.folder / "dict" / "plan" / "plan.safetensors"))
    assert len(labels.lengths) == plan["needed"] < plan["passages"]
    assert len(labels.manifest.units) >= 3
    wrong = 0
    for number in range(len(labels.lengths)):
        batch = labels.read(np.array([number]))
        hidden = teacher.embed(batch.ids.numpy(), batch.mask.numpy())
        wrong += int((dictionary.assign(batch.ids[0], hidden[0]) != batch.senses[0]).sum())
        np.testing.assert_allclose(pool(hidden, batch.mask, "mean", normalize=False), batch.pooled, atol=0.05)
    assert wrong <= 0.001 * labels.lengths.sum()  # another batch rounds otherwise
    held = labels.held_out()
    assert 0 < len(held) < len(labels.lengths) / 2
    trained = np.concatenate(list(labels.batches(0, 0, 500)))
    assert sorted([*held.tolist(), *trained.tolist()]) == list(range(len(labels.lengths)))


def _dtype(run: Path) -> str:
    return storage.read_json(RunFolder(str(run)).manifest)["pins"]["dtype"]


@without_ray
def test_whole_documents_are_held_out_and_train_tokens_bound_the_first_by_key(made: Corpus) -> None:
    """Passages of a long document share its flag; fewer tokens are the first of more."""
    text = made.folder / "long.txt"
    rng = np.random.default_rng(1)
    text.write_text("\n".join(" ".join(rng.choice(WORDS, 200)) for _ in range(40)))
    made.build("dict")
    given = {
        "dictionary": str(made.folder / "dict"),
        "corpus": (str(text),),
        "teacher": str(made.teacher),
        "held_out": 0.3,
    }
    everything = distill(made.folder / "all", **given, train_tokens=10**9)
    column = open_parquet(str(made.folder / "all" / "passages" / "000000.parquet")).read(columns=["document_id"])
    documents = np.array(column.column("document_id").to_pylist())
    held = np.zeros(len(documents), dtype=bool)
    held[everything.held_out()] = True
    assert len(documents) == len(everything.lengths) > 120
    for document in set(documents):
        assert len(set(held[documents == document])) == 1
    assert 2 <= len(set(documents[held])) <= 25
    some = distill(made.folder / "some", **given, train_tokens=3000)
    fewer = distill(made.folder / "fewer", **given, train_tokens=1500)
    assert 1200 < fewer.manifest.tokens <= 1500 < some.manifest.tokens <= 3000
    texts = [{tuple(row.ids[0].tolist()) for row in map(labels.read, np.arange(len(labels.lengths))[:, None])}
             for labels in (fewer, some, everything)]  # fmt: skip
    assert texts[0] < texts[1] < texts[2]
    with pytest.raises(BadInput, match=r"--train-tokens 3 has no room for the first passages: give \d+ or more"):
        distill(made.folder / "none", **given, train_tokens=3)


# --- batches ----------------------------------------------------------------------------------------------------------


def label_set(lengths: list[int], held: list[bool]) -> LabelSet:
    """Labels of passages of these lengths, without files."""
    labels = object.__new__(LabelSet)
    labels.lengths, labels._held_out = np.array(lengths, np.int32), np.array(held)
    return labels


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=300),
    st.integers(1, 400),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_batches_hold_each_passage_once_and_are_the_same_for_any_world(
    passages: list[tuple[int, bool]], budget: int, world: int, epoch: int
) -> None:
    lengths, held = (list(column) for column in zip(*passages, strict=True))
    labels = label_set(lengths, held)
    alone = list(labels.batches(epoch, 7, budget))
    assert sorted(p for batch in alone for p in batch.tolist()) == [n for n, out in enumerate(held) if not out]
    assert all(len(b) == 1 or len(b) * labels.lengths[b].max() <= budget for b in alone)
    shares = [list(labels.batches(epoch, 7, budget, world, rank)) for rank in range(world)]
    assert {len(share) for share in shares} == {len(alone)} == {labels.steps(epoch, 7, budget)}
    for number, batch in enumerate(alone):
        together = [share[number] for share in shares]
        assert sorted(np.concatenate(together).tolist()) == sorted(batch.tolist())
        assert max(map(len, together)) - min(map(len, together)) <= 1
    again = list(labels.batches(epoch, 7, budget, first_step=2))
    assert [b.tolist() for b in again] == [b.tolist() for b in alone[2:]]


def test_batches_are_shuffled_anew_and_waste_little_padding() -> None:
    rng = np.random.default_rng(0)
    labels = label_set(rng.integers(5, 120, 20_000).tolist(), [False] * 20_000)
    first, second, other = (list(labels.batches(*place, 8192)) for place in ((0, 0), (1, 0), (0, 1)))
    assert first[0].tolist() != second[0].tolist() != other[0].tolist()
    padded = sum(len(b) * int(labels.lengths[b].max()) for b in first)
    assert labels.lengths.sum() / padded > 0.95
    assert labels.lengths.sum() / 8192 / len(first) > 0.9  # batches are full
    widths = [int(labels.lengths[b].max()) for b in first]
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.3  # not from short to long


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_any_workers_and_a_killed_worker_or_driver_give_the_same_bytes(
    ray: None, made: Corpus, in_process: None, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    """On a real Ray, with a light teacher; the dictionary is built without it."""
    made.build("dict", senses=3)
    monkeypatch.undo()
    logs = {name: made.folder / f"{name}.log" for name in ("whole", "killed", "worker")}

    def given(name: str, workers: int = 2) -> dict:
        return of(made, output=str(made.folder / name), dtype="float32", workers=workers)

    monkeypatch.setattr(distill_run, "train", lambda *_: {})
    driver.labels_in_small_pieces(logs["whole"], monkeypatch.setattr)
    distill_student(DistillConfig(**given("whole", workers=1)))
    whole = all_bytes(made.folder / "whole")
    units = sum(name.endswith(".safetensors") and name[0] == "0" for name in whole)
    assert units >= 5
    with monkeypatch.context() as patch:
        driver.labels_in_small_pieces(logs["worker"], patch.setattr)
        actor, flag = labels_module.LabelActor, made.folder / "flag"

        class DyingActor(actor):
            def __call__(self, item: dict) -> dict:
                return killed_once(super().__call__, flag, "write_json")(item)

        patch.setattr(labels_module, "LabelActor", DyingActor)
        distill_student(DistillConfig(**given("worker")))
    assert flag.exists()
    assert all_bytes(made.folder / "worker") == whole
    assert len(logs["worker"].read_text().splitlines()) == units + 1
    outcome("worker killed", "labels", "same run goes on")
    process = driver.start(given("killed"), logs["killed"], ("labels", 2))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = driver.start(given("killed"), logs["killed"])
    process.join()
    assert process.exitcode == 0
    assert all_bytes(made.folder / "killed") == whole
    begun = logs["killed"].read_text().splitlines()
    assert set(begun) == {f"labels {number}" for number in range(units)}
    assert len(begun) <= units + 2  # at most one unit a worker twice
    journal = storage.read_json(RunFolder(str(made.folder / "killed")).journal)["drivers"]
    assert journal[-1]["stages"]["labels"]["kept"] >= 1
    outcome("driver killed", "labels", "next run goes on")
    assert not list((made.folder / "killed").rglob(".*.part"))


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(made: Corpus) -> Corpus:
    made.build("dict", max_occurrences=60)
    distill(made.folder / "run", **of(made))
    return made


def of(made: Corpus, **more: object) -> dict:
    return {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), "soft_targets": 2, **more}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"byte flipped": flip_a_byte, "file cut short": cut, "file gone": Path.unlink}


@without_ray
@pytest.mark.parametrize("fault", DAMAGES)
@pytest.mark.parametrize("name", ["000001.safetensors", "senses.safetensors", "labels.json"])
def test_a_damaged_file_is_refused_and_made_again(
    made: Corpus, labelled: Corpus, name: str, fault: str, outcome: Outcome
) -> None:
    damage = DAMAGES[fault]
    before = all_bytes(made.folder / "run")
    damage(made.folder / "run" / "labels" / name)
    if not (damage is flip_a_byte and name == "senses.safetensors"):  # that one has no hash outside its marker
        with pytest.raises(BadInput, match=r"(damaged|no finished) .*jobs/distill\.py"):
            LabelSet.open(str(made.folder / "run"), verify=True)
    distill(made.folder / "run", **of(made))
    assert all_bytes(made.folder / "run") == before
    outcome(fault, "labels", "made again")


@without_ray
def test_values_that_cannot_be_are_refused_when_read(labelled: Corpus) -> None:
    from safetensors.numpy import load_file, save_file

    path = labelled.folder / "run" / "labels" / "000000.safetensors"
    good = load_file(path)

    def put(name: str, value: float) -> None:
        columns = {key: array.copy() for key, array in good.items()}
        columns[name].reshape(-1)[0 if name != "offsets" else 1] = value
        save_file(columns, path)

    wrong = [("ids", 60_000, "outside the 25"), ("ids", -1, "outside"), ("senses", 60_000, "does not have")]
    wrong += [
        ("soft_senses", 60_000, "does not have"),
        ("soft_weights", np.nan, "sum to 1"),
        ("soft_weights", 2, "sum"),
    ]
    wrong += [("pooled", np.inf, "NaN or infinite")]
    for name, value, told in wrong:
        put(name, value)
        with pytest.raises(BadInput, match=rf"labels in .*000000\.safetensors are damaged \(.*{told}.*made again"):
            LabelSet.open(str(labelled.folder / "run")).read(np.array([0]))
    for name, value, told in (("offsets", 10**6, "follow one another"), ("held_out", 7, "holds out other")):
        put(name, value)
        with pytest.raises(BadInput, match=told):
            LabelSet.open(str(labelled.folder / "run"))
    save_file({**good, "more": good["ids"]}, path)
    with pytest.raises(BadInput, match="more or less than its manifest"):
        LabelSet.open(str(labelled.folder / "run"))
    save_file({**good, "ids": good["ids"].astype(np.int64)}, path)
    with pytest.raises(BadInput, match="ids is not I32"):
        LabelSet.open(str(labelled.folder / "run"))
    save_file(good, path)
    labels = LabelSet.open(str(labelled.folder / "run"))
    for numbers in ([], [-1], [len(labels.lengths)]):
        with pytest.raises(BadInput, match="no passages, or a number outside"):
            labels.read(np.array(numbers, np.int64))


# --- runs -------------------------------------------------------------------------------------------------------------


@without_ray
def test_changed_settings_are_refused_by_name_but_labels_serve_another_training(
    labelled: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = labelled.folder / "run"
    for name, then, now in (("soft_targets", "2", 3), ("held_out", "0.05", 0.1), ("pooled", "True", False)):
        with pytest.raises(BadInput, match=rf"config\.{name}: {then} then, {now} now[\s\S]*another --output"):
            distill(run, **of(labelled, **{name: now}))
    made_before = {path: path.stat().st_mtime_ns for path in (run / "labels").iterdir()}
    distill(run, **of(labelled, lr=1e-3, workers=1))  # nothing is trained yet
    (run / "student").mkdir()
    with pytest.raises(BadInput, match=r"training\.lr: 0\.001 then, 0\.002 now"):
        distill(run, **of(labelled, lr=2e-3))
    assert {path: path.stat().st_mtime_ns for path in (run / "labels").iterdir()} == made_before
    with pytest.raises(BadInput, match=r"dict is the run folder of a dictionary: give another --output"):
        distill(labelled.folder / "dict", **of(labelled))
    with pytest.raises(BadInput, match="is the run folder of a distillation"):
        labelled.build("run")


@without_ray
def test_the_text_is_read_again_if_the_run_does_not_keep_it(made: Corpus) -> None:
    """With the dictionary's own passages and without them the labels are the same; a text that is gone is told."""
    made.build("dict", max_occurrences=60)
    kept = distill(made.folder / "kept", **of(made))
    assert not (made.folder / "kept" / "passages").exists()
    flip_a_byte(made.folder / "dict" / "passages" / "000000.parquet")
    distill(made.folder / "again", **of(made))
    assert (made.folder / "again" / "passages").exists()
    assert all_bytes(made.folder / "again") == all_bytes(made.folder / "kept")
    assert (made.folder / "dict" / "passages" / "000000.parquet").exists()  # nothing of another run is removed
    shutil.rmtree(made.folder / "dict" / "passages")
    with (made.folder / "corpus" / "a.txt").open("a") as file:
        file.write("the bank\n")
    with pytest.raises(BadInput, match=r"keeps no passages, and the text .* has changed: .*--corpus"):
        distill(made.folder / "changed", **of(made))
    shutil.rmtree(made.folder / "corpus")
    with pytest.raises(BadInput, match=r"keeps no passages, and the text .* is not there any more .*--corpus"):
        distill(made.folder / "gone", **of(made))
    assert kept.manifest.units


@without_ray
def test_dictionary_and_teacher_that_do_not_fit_are_told(made: Corpus, make_teacher: MakeTeacher) -> None:
    with pytest.raises(BadInput, match=r"there is no dictionary at .*dict: give the folder of one"):
        distill(made.folder / "run", **of(made))
    made.build("dict", max_occurrences=60)
    with pytest.raises(BadInput, match=r"teacher 'teacher' is no folder here[\s\S]*say where it is with --teacher"):
        distill(made.folder / "run", dictionary=str(made.folder / "dict"))
    other = make_teacher("llama")
    with pytest.raises(BadInput, match=r"is not the one .*its weights have .*its tokenizer has .*vocabulary is 2\d"):
        distill(made.folder / "run", **of(made, teacher=str(other)))
    alone = shutil.copytree(made.folder / "dict" / "dictionary", made.folder / "alone")
    with pytest.raises(BadInput, match=r"no text: .*alone' lies beside no run .*give --corpus"):
        distill(made.folder / "run", **of(made, dictionary=str(alone)))
    beside = distill(made.folder / "run", **of(made, dictionary=str(made.folder / "dict" / "dictionary")))
    assert beside.manifest.dictionary == SenseDictionary.load(alone).fingerprint
    with pytest.raises(BadInput, match=r"has no finished labels"):
        LabelSet.open(str(made.folder / "dict"))


@without_ray
def test_a_teacher_that_pools_otherwise_or_overflows_is_told(made: Corpus) -> None:
    with pytest.raises(BadInput, match=r"pools by 'max', msense only by mean, cls, lasttoken: give --no-pooled"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), "max", normalize=False)
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert pool(hidden, mask, "cls", normalize=False).tolist() == [[2, 3], [6, 7]]
    assert pool(hidden, mask, "lasttoken", normalize=False).tolist() == [[4, 5], [8, 9]]
    assert pool(hidden, mask, "mean", normalize=False).tolist() == [[3, 4], [7, 8]]
    assert pool(hidden, mask, "mean", normalize=True).norm(dim=1).tolist() == pytest.approx([1, 1])


@without_ray
def test_dry_run_and_status(made: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made.build("dict", max_occurrences=60)
    run = made.folder / "run"
    monkeypatch.setattr("msense.labels.UNIT_BYTES", (60_000, 60_000))  # more than a batch a unit, or nothing is timed
    found = distill_student(DistillConfig(output=str(run), dry_run=True, time_teacher=True, **of(made)))["estimate"]
    assert not (run / "labels" / "000000.safetensors").exists()
    labels = distill(run, **of(made))
    size = sum(unit.size for unit in labels.manifest.units)
    assert found["total_bytes"] <= size <= found["total_bytes"] + 1000 * found["units"]  # headers
    assert (found["passages"], found["tokens"]) == (labels.manifest.passages, labels.manifest.tokens)
    assert found["pooled_bytes"] == 32 * found["passages"]
    assert found["tokens_per_second"] > 0
    monkeypatch.setenv("COLUMNS", "300")
    show_status(str(run))
    shown = capsys.readouterr().out
    units = len(labels.manifest.units)
    assert f"{units} of {units} units" in shown
    assert f"{labels.manifest.tokens:,} tokens" in shown
    assert "held out" in shown
