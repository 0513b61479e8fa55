"""Classifiers on token embeddings, GLUE's tasks, and fine-tuning: what is learnt, kept, refused and resumed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from test_evaluation import write_task

from msense import SenseDictionary, finetune
from msense.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from msense.config import BuildConfig
from msense.corpus import cut_pieces, list_files
from msense.errors import BadInput, MsenseError
from msense.evaluation import classifier as task
from msense.evaluation.models import make_model
from msense.evaluation.spec import Spec
from msense.finetune_config import FinetuneConfig
from msense.finetune_worker import Tuner, _read, batches
from msense.flags import validate
from msense.glue import DEV, GLUE, TEST, TRAIN, joiner_of, read_part, task_of
from msense.labelled import Columns
from msense.runtime import Resources
from msense.student.tokenizer import padded
from msense.teacher import describe, load_body
from msense.tokens import read_block, write_passages
from msense.train_loop import Group


def config_of(**told: object) -> ClassifierConfig:
    return ClassifierConfig(**{"task": "t", "dim": 2, "pooling": "mean", "labels": ("no", "yes"), **told})  # type: ignore[arg-type]


def by_hand(pooling: str = "mean") -> Classifier:
    """Scores tanh of the first number, and twice it."""
    classifier = Classifier(config_of(pooling=pooling)).eval()
    with torch.no_grad():
        classifier.dense.weight.copy_(torch.eye(2))
        classifier.dense.bias.zero_()
        classifier.out.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        classifier.out.bias.copy_(torch.tensor([0.0, 1.0]))
    return classifier


@pytest.mark.parametrize(("pooling", "first"), [("mean", 0.5), ("cls", 0.2), ("lasttoken", 0.8)])
def test_a_classifier_pools_and_scores(pooling: str, first: float) -> None:
    hidden = torch.tensor([[[0.2, 5.0], [0.8, 5.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    wanted = torch.tensor([[np.tanh(first), 2 * np.tanh(first) + 1]]).float()
    torch.testing.assert_close(by_hand(pooling)(hidden, mask), wanted)
    torch.testing.assert_close(by_hand(pooling).of_rows(hidden[0, :2], torch.tensor([2])), wanted)


def test_a_classifier_comes_back_from_its_folder(tmp_path: Path) -> None:
    save_classifier(tmp_path, by_hand())
    found = load_classifier(tmp_path)
    assert found.config == config_of()
    for name, tensor in by_hand().state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    assert not found.training


def _config(folder: Path, **told: object) -> None:
    path = folder / "classifier" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(dict(by_hand().state_dict())), folder / "classifier" / "classifier.safetensors")


def _link(folder: Path) -> None:
    path = folder / "classifier" / "classifier.safetensors"
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")


HOSTILE = {
    "none": (lambda f: shutil.rmtree(f / "classifier"), "has no classifier.*jobs/finetune.py"),
    "no weights": (lambda f: (f / "classifier" / "classifier.safetensors").unlink(), "is missing"),
    "a pipe": (
        lambda f: ((f / "classifier" / "config.json").unlink(), os.mkfifo(f / "classifier" / "config.json")),
        "no plain",
    ),
    "a link": (_link, "outside the classifier"),
    "no JSON": (lambda f: (f / "classifier" / "config.json").write_text("{"), "config.json is not JSON"),
    "another version": (lambda f: _config(f, format_version=2), "format version 2"),
    "one label": (lambda f: _config(f, labels=["a"]), "labels"),
    "a label twice": (lambda f: _config(f, labels=["a", "a"]), "labels.*twice"),
    "more labels": (lambda f: _config(f, labels=["a", "b", "c"]), "does not fit"),
    "another width": (lambda f: _config(f, dim=3), "does not fit"),
    "huge": (lambda f: _config(f, dim=1 << 16), "does not fit"),
    "another pooling": (lambda f: _config(f, pooling="max"), "pooling"),
    "cut off": (lambda f: os.truncate(f / "classifier" / "classifier.safetensors", 40), "cut off"),
    "half": (lambda f: _weights(f, lambda w: {n: t.half() for n, t in w.items()}), "does not fit"),
    "NaN": (lambda f: _weights(f, lambda w: {n: t * float("nan") for n, t in w.items()}), "NaN"),
    "one more": (lambda f: _weights(f, lambda w: w | {"x": torch.zeros(1)}), "does not fit"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_classifier_is_refused(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    save_classifier(folder, by_hand())
    break_it, told = HOSTILE[how]
    break_it(folder)
    with pytest.raises(BadInput, match=told):
        load_classifier(folder)


def test_glue_has_its_eight_tasks() -> None:
    pairs = {name for name, own in GLUE.items() if len(own.columns.texts) == 2}
    assert pairs == {"mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}
    assert {name for name, own in GLUE.items() if own.regression} == {"stsb"}
    assert {name: own.metrics[0] for name, own in GLUE.items()} == {
        "cola": "Matthews",
        "sst2": "accuracy",
        "mrpc": "F1",
        "stsb": "Pearson",
        "qqp": "F1",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
    }
    assert GLUE["rte"].source == "hf://nyu-mll/glue:rte"
    assert {name: own.test for name, own in GLUE.items() if own.test != "validation"} == {"mnli": "validation_matched"}
    assert task_of("mine", Columns(("t",), "l"), regression=True).metrics[0] == "Pearson"


def test_pairs_are_one_text_that_the_teacher_reads_as_two(teacher: Path, tmp_path: Path) -> None:
    pd.DataFrame({"sentence1": ["the cat"], "sentence2": ["a dog"], "label": [1]}).to_parquet(
        tmp_path / "validation.parquet"
    )
    tokenizer = describe(str(teacher), BuildConfig())[1]
    joiner = joiner_of(tokenizer)
    found = read_part("rte", GLUE["rte"], str(tmp_path), TEST, joiner)
    assert found.texts == ["the cat [SEP] a dog"]
    assert found.labels.tolist() == ["1"]
    whole = ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]
    assert tokenizer.encode(found.texts[0]).tokens == whole
    spec = describe(str(teacher), BuildConfig())[0].passage_spec(BuildConfig())
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": found.texts[0]}) + "\n")
    (piece,) = cut_pieces(list_files((str(tmp_path / "corpus.jsonl"),)))
    write_passages(piece, spec, tokenizer, tmp_path / "p.parquet")
    block = read_block(str(tmp_path / "p.parquet"), 0)
    assert [tokenizer.id_to_token(i) for i in block.ids.tolist()] == whole  # a dictionary's corpus


def test_plain_data_do_under_a_name_of_glue(tmp_path: Path) -> None:
    source = write_task(tmp_path / "d", {"train": [("a", "0")], "test": [("b", "1")], "dev": [("c", "0")]})
    assert [read_part("sst2", GLUE["sst2"], source, part, "").texts for part in (TRAIN, TEST, DEV)] == [
        ["a"],
        ["b"],
        ["c"],
    ]
    with pytest.raises(BadInput, match="sentence"):
        read_part("sst2", GLUE["sst2"], write_task(tmp_path / "e", {"train": []}), TRAIN, "")


def test_numbers_are_asked_for_where_they_are_needed(tmp_path: Path) -> None:
    source = write_task(tmp_path / "d", {"train": [("a", "0.5"), ("b", "2")], "test": [("a", "many")]})
    assert read_part("x", task_of("x", regression=True), source, TRAIN, "").labels.tolist() == [0.5, 2.0]
    with pytest.raises(BadInput, match="no number"):
        read_part("x", task_of("x", regression=True), source, TEST, "")


def test_batches_hold_every_text_once_and_follow_from_the_seed() -> None:
    rows = [np.zeros(n, np.int64) for n in np.random.default_rng(0).integers(1, 50, 333)]
    first, again, other = (list(batches(rows, 8, seed)) for seed in ((0, 1), (0, 1), (0, 2)))
    assert sorted(np.concatenate(first).tolist()) == list(range(333))
    assert all(len(batch) <= 8 for batch in first)
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in other]
    spans = [np.ptp([len(rows[i]) for i in batch]) for batch in first]
    assert np.mean(spans) < 5


def of(folder: object) -> Spec:
    return Spec("t", "teacher", teacher=str(folder))


def toy(folder: Path, shuffled: bool = False) -> str:
    """Texts on rivers and on money, labelled so, or at random."""
    rng = np.random.default_rng(0)
    words = {"water": ["river", "deep", "near"], "coin": ["money", "full", "of"]}

    def rows(n: int) -> list[tuple[str, str]]:
        found = []
        for i in range(n):
            label = ("water", "coin")[i % 2]
            text = " ".join(
                [*rng.choice(words[label], 2), *rng.choice(["the", "cat", "mat", "is"], rng.integers(1, 5))]
            )
            found.append((text, ("water", "coin")[rng.integers(2)] if shuffled else label))
        return found

    return write_task(folder, {"train": rows(192), "dev": rows(60), "test": rows(60)})


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, teacher: Path, tmp_path: Path) -> Callable[..., dict]:
    """Fine-tune in this process; whatever Ray Train would do is done at once."""

    class Kept:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def as_directory(self) -> "Kept":
            return self

        def __enter__(self) -> str:
            return str(self.folder)

        def __exit__(self, *_: object) -> None:
            pass

    class Done:
        def __init__(self, told: dict, folder: Path) -> None:
            tuner = Tuner(told["tuning"], Group())
            list(tuner.run())
            tuner.save_teacher(folder / "teacher")
            self.tuner, self.return_value, self.checkpoint = tuner, tuner.history, Kept(folder)

    calls: list[Done] = []

    def fit(name: str, worker: object, told: dict, run: object, resources: object) -> Done:
        Path(told["tuning"].run, "training").mkdir(exist_ok=True)  # where Ray Train keeps checkpoints
        calls.append(Done(told, tmp_path / f"checkpoint{len(calls)}"))
        return calls[-1]

    monkeypatch.setattr(finetune, "fit", fit)
    monkeypatch.setattr(finetune, "connect", lambda workers: Resources(actors=1, tasks=1, device="cpu"))
    monkeypatch.setattr(finetune, "run_task", lambda work, *arguments, device="cpu": work(*arguments))

    def call(source: str, **told: object) -> dict:
        given = {"task": f"toy={source}", "teacher": str(teacher), "lr": 3e-3, "epochs": 16, "train_dtype": "float32"}
        given |= {"output": str(tmp_path / "out"), "dropout": 0.0, **told}
        return finetune.finetune(validate(FinetuneConfig, given)) | {"calls": calls}

    return call


def test_what_there_is_to_learn_is_learnt_and_noise_is_not(tune: Callable[..., dict], tmp_path: Path) -> None:
    clear = tune(toy(tmp_path / "clear"))
    assert clear["epochs"][-1]["dev_accuracy"] > 0.95
    noise = tune(toy(tmp_path / "noise", shuffled=True), output=str(tmp_path / "noise-out"))
    assert noise["epochs"][-1]["dev_accuracy"] < 0.75
    assert clear["epochs"][-1]["train_loss"] < noise["epochs"][-1]["train_loss"]


def test_the_tuned_teacher_is_a_teacher_with_a_classifier(tune: Callable[..., dict], tmp_path: Path) -> None:
    source = toy(tmp_path / "toy")
    summary = tune(source, pooling="cls")
    folder = summary["teacher"]
    info, tokenizer = describe(folder, BuildConfig())
    assert (info.pooling, info.normalize, info.max_length) == ("cls", False, 64)
    tuner = summary["calls"][-1].tuner
    body = load_body(Path(folder), "tuned", torch.float32)
    ids = torch.tensor([tokenizer.encode("the river is deep").ids])
    with torch.no_grad():
        own = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(own, tuner.model.eval().body(ids, torch.ones_like(ids, dtype=torch.bool)))
    lines = [json.loads(line)["text"] for line in Path(summary["corpus"]).read_text().splitlines()]
    assert lines == read_part("toy", task_of("toy"), source, TRAIN, "").texts
    spec = Spec("teacher", "teacher", teacher=folder, dtype="float32")
    model = make_model(spec, "cpu", 1)
    library = make_model(Spec("st", "encoder", source=folder), "cpu", 1)
    np.testing.assert_allclose(library.encode(["the cat"]), model.encode(["the cat"]), rtol=1e-4, atol=1e-5)
    found = task.measure(model, source, "toy", of(folder), Columns())
    assert found.score > 0.95
    assert found.gold == read_part("toy", task_of("toy"), source, TEST, "").labels.tolist()
    assert task.texts(source, "toy", of(folder), Columns()) == read_part("toy", task_of("toy"), source, TEST, "").texts


@pytest.mark.parametrize(
    ("kind", "pooling", "prompt"),
    [("bert", "mean_tokens", "the cat is "), ("roberta", None, None), ("t5", None, None), ("llama", "lasttoken", None)],
)
def test_a_tuned_teacher_of_any_kind_reads_as_it_was_trained(
    tune: Callable[..., dict], make_teacher: Callable[..., Path], tmp_path: Path, kind: str, pooling: str, prompt: str
) -> None:
    source = toy(tmp_path / "toy")
    summary = tune(source, teacher=str(make_teacher(kind, pooling, prompt)), epochs=1)
    tuner, folder = summary["calls"][-1].tuner, summary["teacher"]
    part = _read(tuner.tuning, TEST)
    ids, mask = padded(part.rows)
    with torch.no_grad():
        hidden = tuner.model.eval().body(ids, mask)[mask]
        scores = tuner.model(ids, mask)
    model = make_model(Spec("teacher", "teacher", teacher=folder, dtype="float32"), "cpu", 1)
    read = model.read(task.texts(source, "toy", of(folder), Columns()))
    assert read.ids.tolist() == np.concatenate(part.rows).tolist()  # the prompt too
    torch.testing.assert_close(torch.from_numpy(read.hidden), hidden, rtol=1e-4, atol=1e-4)
    labels = tuner.tuning.classifier.labels
    wanted = [labels[i] for i in scores.argmax(1).tolist()]
    assert task.measure(model, source, "toy", of(folder), Columns()).found == wanted
    assert "| task | toy |" in (Path(folder) / "README.md").read_text()


def test_replaced_by_its_own_embeddings_the_teacher_says_the_same(tune: Callable[..., dict], tmp_path: Path) -> None:
    source = toy(tmp_path / "toy")
    folder = tune(source, epochs=1)["teacher"]
    model = make_model(Spec("teacher", "teacher", teacher=folder, dtype="float32"), "cpu", 1)
    read = model.read(task.texts(source, "toy", of(folder), Columns()))
    dictionary = SenseDictionary.fit(read.ids, read.hidden, k=500, vocab_size=model.info.vocab_size, dtype="float32")
    dictionary.save(tmp_path / "exact")
    coarse = SenseDictionary.fit(read.ids, read.hidden, k=1, vocab_size=model.info.vocab_size)
    coarse.save(tmp_path / "coarse")
    told = {"teacher": folder, "dtype": "float32", "replace": "hard"}
    exact, mean = (
        make_model(Spec(name, "replaced", source=str(tmp_path / name), **told), "cpu", 1)
        for name in ("exact", "coarse")
    )
    wanted, same, other = (task.measure(m, source, "toy", of(folder), Columns()).found for m in (model, exact, mean))
    assert same == wanted
    np.testing.assert_allclose(exact.read(["the cat"]).hidden.shape, mean.read(["the cat"]).hidden.shape)
    assert not np.allclose(mean.encode(["the cat"]), model.encode(["the cat"]))
    assert len(other) == len(wanted)


def test_a_regression_predicts_numbers(tune: Callable[..., dict], tmp_path: Path) -> None:
    source = Path(toy(tmp_path / "toy"))
    for part in ("train", "dev", "test"):
        table = pd.read_csv(source / f"{part}.csv")
        table["label"] = (table["label"] == "water") * 3.0 - 1
        table.to_csv(source / f"{part}.csv", index=False)
    summary = tune(str(source), regression=True)
    assert summary["epochs"][-1]["dev_Pearson"] > 0.9
    spec = Spec("teacher", "teacher", teacher=summary["teacher"], dtype="float32")
    found = task.measure(make_model(spec, "cpu", 1), str(source), "toy", of(summary["teacher"]), Columns())
    assert found.metric == "Pearson"
    assert found.score > 0.9


def test_mnli_tells_of_both_of_its_test_parts(tune: Callable[..., dict], tmp_path: Path) -> None:
    source = tmp_path / "mnli"
    source.mkdir()
    for part, count in (("train", 96), ("validation_matched", 40), ("validation_mismatched", 20)):
        rows = [(("the river", "deep", "0"), ("the cat", "money", "1"))[i % 2] for i in range(count)]
        table = pd.DataFrame(rows, columns=["premise", "hypothesis", "label"])
        if part == "validation_mismatched":
            table["label"] = table["label"].map({"0": "1", "1": "0"})
        table.to_parquet(source / f"{part}.parquet")
    folder = tune(str(source), task=f"mnli={source}", epochs=8)["teacher"]
    assert load_classifier(folder).config.joiner == " [SEP] "
    model = make_model(Spec("teacher", "teacher", teacher=folder, dtype="float32"), "cpu", 1)
    found = task.measure(model, str(source), "mnli", of(folder), Columns())
    assert (found.score, len(found.gold or [])) == (1.0, 40)
    assert found.more["accuracy, validation_mismatched"] == 0.0
    (source / "validation_mismatched.parquet").unlink()
    assert set(task.measure(model, str(source), "mnli", of(folder), Columns()).more) == {"macro F1"}


def test_two_shares_of_a_batch_add_up_to_the_whole(tune: Callable[..., dict], tmp_path: Path) -> None:
    """Gradients of two workers, averaged as data-parallel training averages them, are those of one."""
    summary = tune(toy(tmp_path / "toy"), epochs=1)
    tuning = summary["calls"][-1].tuner.tuning
    batch = np.arange(7)

    def gradients(group: Group) -> list[torch.Tensor]:
        tuner = Tuner(tuning, group)
        tuner.model.eval()  # the body's own dropout is random
        tuner.engine.step = lambda lr: None  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Group, "sum", lambda self, values, device: values)
            tuner._step(batch, 0.0)
        return [p.grad.clone() for p in tuner.model.parameters() if p.grad is not None]

    one, parts = gradients(Group()), [gradients(Group(rank, 2)) for rank in (0, 1)]
    for whole, first, second in zip(one, *parts, strict=True):
        torch.testing.assert_close((first + second) / 2, whole, rtol=1e-4, atol=1e-6)


def test_a_finished_one_is_left_and_a_changed_one_is_not(tune: Callable[..., dict], tmp_path: Path) -> None:
    source = toy(tmp_path / "toy")
    first = tune(source, epochs=1)
    stamp = Path(first["corpus"]).stat().st_mtime_ns
    assert len(tune(source, epochs=1, workers=3)["calls"]) == 1
    assert len(tune(source, epochs=1, lr=1e-3)["calls"]) == 2
    assert Path(first["corpus"]).stat().st_mtime_ns == stamp  # or a dictionary of it would be refused
    (Path(source) / "train.csv").write_text((Path(source) / "train.csv").read_text() + "the cat,water\n")
    assert len(tune(source, epochs=1, lr=1e-3)["calls"]) == 3


def test_what_another_one_left_is_not_taken_for_its_own(
    tune: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = toy(tmp_path / "first"), toy(tmp_path / "second", shuffled=True)
    before = tune(first, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "keep_teacher", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            tune(second, epochs=1)
    after = tune(first, epochs=1)
    assert len(after["calls"]) == 3  # not called finished, as the corpus was another's
    assert after["epochs"] == before["epochs"]
    shutil.rmtree(after["teacher"])
    assert len(tune(first, epochs=1)["calls"]) == 4


def test_a_change_that_fails_leaves_what_was_finished(
    tune: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = tune(toy(tmp_path / "toy"), epochs=1)
    corpus = Path(first["corpus"]).read_text()
    other = write_task(tmp_path / "other", {"train": [("the mat", "x"), ("a dog", "y")]})
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "fit", lambda *told: (_ for _ in ()).throw(MsenseError("stopped")))
        with pytest.raises(MsenseError, match="stopped"):
            tune(other, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "keep_teacher", lambda *told: (_ for _ in ()).throw(MsenseError("disk full")))
        again = tune(str(tmp_path / "toy"), epochs=1)
        assert len(again["calls"]) == 1
        assert Path(again["corpus"]).read_text() == corpus
        with pytest.raises(MsenseError, match="disk full"):
            tune(other, epochs=1)
    assert len(tune(str(tmp_path / "toy"), epochs=1)["calls"]) == 3  # the folder may hold half of another
    assert Path(first["corpus"]).read_text() == corpus


def test_nothing_of_an_older_teacher_stays(
    tune: Callable[..., dict], make_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    source = toy(tmp_path / "toy")
    folder = tune(source, epochs=1, teacher=str(make_teacher("bert", "mean_tokens", "the cat is ")))["teacher"]
    assert describe(folder, BuildConfig())[0].prompt == "the cat is "
    assert len(tune(source, epochs=1, teacher=str(make_teacher("bert", "mean_tokens")))["calls"]) == 2
    assert describe(folder, BuildConfig())[0].prompt == ""
    tune(source, epochs=1, teacher=str(make_teacher("bert", "cls_token")))  # of the same weights
    assert load_classifier(folder).config.pooling == "cls"


def test_what_is_read_or_of_others_is_not_replaced(tune: Callable[..., dict], teacher: Path, tmp_path: Path) -> None:
    source = toy(tmp_path / "toy")
    shutil.copytree(teacher, tmp_path / "out" / "teacher")
    with pytest.raises(BadInput, match=r"not written by jobs/finetune\.py"):
        tune(source, epochs=1)
    with pytest.raises(BadInput, match="is the folder that is written"):
        tune(source, epochs=1, teacher=str(tmp_path / "out" / "teacher"))
    for path in teacher.iterdir():
        assert (tmp_path / "out" / "teacher" / path.name).read_bytes() == path.read_bytes()


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tune: Callable[..., dict], tmp_path: Path) -> None:
    summary = tune(toy(tmp_path / "toy"), epochs=3, dropout=0.1)
    tuning = summary["calls"][-1].tuner.tuning
    halted = Tuner(tuning, Group())
    next(halted.run())
    (tmp_path / "half").mkdir()
    halted.save(tmp_path / "half")
    again = Tuner(tuning, Group())
    again.restore(tmp_path / "half")
    list(again.run())
    assert again.history == summary["epochs"]
    (tmp_path / "half" / "state.json").write_text("[")
    with pytest.raises(BadInput, match="damaged"):
        Tuner(tuning, Group()).restore(tmp_path / "half")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"task": "toy"}, "NAME=DATA"),
        ({"task": "=x"}, "NAME=DATA"),
        ({"task": "toy=/nowhere"}, "nowhere"),
        ({"task": "sst2={data}", "regression": True}, "has labels"),
        ({"task": "toy={data}", "label_column": "tag"}, "no column 'tag'"),
        ({"task": "toy={data}", "label_column": "text", "epochs": 1}, "both of the text and of the label"),
    ],
)
def test_what_cannot_be_tuned_is_refused(given: dict, told: str, teacher: Path, tmp_path: Path) -> None:
    source = write_task(tmp_path / "d", {"train": [("a", "x")], "test": [("a", "x")]})
    given = {
        **given,
        "task": given["task"].replace("{data}", source),
        "teacher": str(teacher),
        "output": str(tmp_path / "o"),
    }
    with pytest.raises(BadInput, match=told):
        finetune.finetune(validate(FinetuneConfig, given))


def test_a_classifier_of_another_width_or_kind_is_refused(
    shipped_student: tuple, teacher: Path, tmp_path: Path
) -> None:
    rows = [("the cat", "no"), ("a dog", "yes")]
    source = write_task(tmp_path / "toy", {"train": rows, "test": rows})
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    save_classifier(folder, by_hand())
    model = make_model(Spec("teacher", "teacher", teacher=str(folder), dtype="float32"), "cpu", 1)
    with pytest.raises(BadInput, match=r"width 16.*takes 2"):
        task.measure(model, source, "toy", of(str(folder)), Columns())
    with pytest.raises(BadInput, match="'water', is one of the classifier's, such as 'no'"):
        task.measure(model, toy(tmp_path / "other"), "toy", of(folder), Columns())
    with pytest.raises(BadInput, match="is of pairs"):
        task.measure(model, source, "rte", of(folder), Columns())
    with pytest.raises(BadInput, match="predicts labels"):
        task.measure(model, source, "stsb", of(str(folder)), Columns())


def test_on_a_real_ray_it_ends_with_a_teacher(
    ray: None, teacher: Path, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = toy(tmp_path / "toy")
    patch.chdir(teacher.parent)  # Ray's workers are elsewhere
    given = {
        "task": f"toy={source}",
        "teacher": teacher.name,
        "lr": 3e-3,
        "epochs": 9,
        "train_dtype": "float32",
        "workers": 1,
    }
    config = validate(FinetuneConfig, {**given, "output": str(tmp_path / "out")})
    summary = finetune.finetune(config)
    assert len(summary["epochs"]) == 9
    assert summary["epochs"][-1]["dev_accuracy"] > 0.8
    assert load_classifier(summary["teacher"]).config.labels == ("coin", "water")


@pytest.mark.slow
def test_after_a_worker_was_killed_it_ends_with_the_same_figures(
    ray: None, teacher: Path, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {
        "task": f"toy={toy(tmp_path / 'toy')}",
        "teacher": str(teacher),
        "lr": 3e-3,
        "epochs": 3,
        "train_dtype": "float32",
        "workers": 2,
    }
    whole = finetune.finetune(validate(FinetuneConfig, {**given, "output": str(tmp_path / "whole")}))
    flag = tmp_path / "flag"
    patch.setattr(finetune, "worker", killed_once(9, flag))  # 6 steps make an epoch
    killed = finetune.finetune(validate(FinetuneConfig, {**given, "output": str(tmp_path / "killed")}))
    assert flag.exists()
    for found, wanted in zip(killed["epochs"], whole["epochs"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    ours, theirs = (load_classifier(summary["teacher"]).state_dict() for summary in (killed, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_what_has_trained_but_was_not_kept_is_kept_without_a_step(
    ray: None, teacher: Path, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"task": f"toy={toy(tmp_path / 'toy')}", "teacher": str(teacher), "epochs": 2, "train_dtype": "float32"}
    config = validate(FinetuneConfig, {**given, "workers": 1, "output": str(tmp_path / "out")})
    with patch.context() as inner:
        inner.setattr(finetune, "keep_teacher", stopping())
        with pytest.raises(Exception, match="stopped before"):
            finetune.finetune(config)
    patch.setattr(finetune, "worker", killed_once(1, tmp_path / "flag"))
    summary = finetune.finetune(config)
    assert not (tmp_path / "flag").exists()
    assert len(summary["epochs"]) == 2
    assert load_classifier(summary["teacher"]).config.labels == ("coin", "water")


def stopping() -> Callable:
    """Return what stops a run once it has trained; goes to workers by value."""

    def stop(checkpoint: object, uri: str) -> None:
        raise OSError("stopped before the teacher was kept")

    return stop


def killed_once(step: int, flag: Path) -> Callable:
    """Return what a worker runs, but the first to come to a step makes a file and dies there; goes to workers by value."""

    def worker(given: dict) -> list:
        import os
        import signal

        from msense import finetune_worker

        original, steps = finetune_worker.Tuner._step, [0]

        def counted(self: object, *arguments: object) -> float:
            steps[0] += 1
            if steps[0] == step and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments)

        finetune_worker.Tuner._step = counted
        return finetune_worker.finetune_worker(given)

    return worker
