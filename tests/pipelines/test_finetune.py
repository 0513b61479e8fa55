"""Classifiers on token embeddings, GLUE tasks, and fine-tuning: learning, saved folders, invalid input and resuming."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from executors import DisturbedTraining, StoppedError, stopped, stopping
from safetensors.torch import save_file
from task_data import write_task

from msense import SenseDictionary
from msense.config.base import validate_config
from msense.config.build import BuildConfig
from msense.config.finetune import FinetuneConfig
from msense.corpus import cut_splits, list_files
from msense.corpus.chunking import write_passages
from msense.corpus.glue import DEV, GLUE, TEST, TRAIN, get_task, pair_separator, read_split
from msense.corpus.labelled import Columns
from msense.corpus.passages import read_block
from msense.errors import InputError
from msense.evaluation.models import TokenModel, make_model
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec
from msense.evaluation.tasks import classifier as task
from msense.pipelines.finetune import _name, finetune
from msense.runtime import Executor
from msense.runtime.ray_executor import RayExecutor
from msense.stages.passages import passage_spec
from msense.student.tokenizer import pad_ids
from msense.teacher.body import load_body
from msense.teacher.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from msense.teacher.finetuned import save_teacher
from msense.teacher.spec import load_teacher_info
from msense.training.finetuner import Finetuner, batches, read_tokenized
from msense.training.loop import ProcessGroup

MakeTeacher = Callable[..., Path]
Tune = Callable[..., SimpleNamespace]
SETTINGS = {"lr": 3e-3, "batch_size": 16, "train_dtype": "float32"}
LEARN = {"train": 96, "test": 24}  # texts that suffice to learn most of the toy task in six epochs


def known_classifier(pooling: str = "mean") -> Classifier:
    """Return a classifier whose scores are t and 2t + 1, where t is the tanh of the first dimension."""
    config = ClassifierConfig(task="t", dim=2, pooling=pooling, labels=("no", "yes"))  # type: ignore[arg-type]
    classifier = Classifier(config).eval()
    with torch.no_grad():
        classifier.dense.weight.copy_(torch.eye(2))
        classifier.dense.bias.zero_()
        classifier.out.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        classifier.out.bias.copy_(torch.tensor([0.0, 1.0]))
    return classifier


@pytest.mark.parametrize(("pooling", "first"), [("mean", 0.5), ("cls", 0.2), ("lasttoken", 0.8)])
def test_classifier_pools_and_scores(pooling: str, first: float) -> None:
    hidden = torch.tensor([[[0.2, 5.0], [0.8, 5.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    expected = torch.tensor([[np.tanh(first), 2 * np.tanh(first) + 1]]).float()
    torch.testing.assert_close(known_classifier(pooling)(hidden, mask), expected)
    torch.testing.assert_close(known_classifier(pooling).of_rows(hidden[0, :2], torch.tensor([2])), expected)


def config_of(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights_of(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(dict(known_classifier().state_dict())), folder / "classifier.safetensors")


def link(folder: Path) -> None:
    path = folder / "classifier.safetensors"
    path.rename(folder.parents[1] / "outside")
    path.symlink_to(folder.parents[1] / "outside")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "has no classifier.*`msense finetune`"),
    "no weights": (lambda f: (f / "classifier.safetensors").unlink(), "is missing"),
    "link": (link, "outside the classifier"),
    "duplicate label": (config_of(labels=["a", "a"]), "labels.*twice"),
    "more labels": (config_of(labels=["a", "b", "c"]), "does not match"),
    "huge": (config_of(dim=1 << 16), "does not match"),
    "other pooling": (config_of(pooling="max"), "pooling"),
    "cut off": (lambda f: os.truncate(f / "classifier.safetensors", 40), r"classifier\.safetensors \(40 bytes\)"),
    "half precision": (weights_of(lambda w: {n: t.half() for n, t in w.items()}), "does not match"),
    "NaN": (weights_of(lambda w: {n: t * float("nan") for n, t in w.items()}), "NaN"),
    "extra tensor": (weights_of(lambda w: w | {"x": torch.zeros(1)}), "does not match"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_classifier_is_refused(how: str, tmp_path: Path) -> None:
    save_classifier(tmp_path / "teacher", known_classifier())
    damage, message = HOSTILE[how]
    damage(tmp_path / "teacher" / "classifier")
    with pytest.raises(InputError, match=message):
        load_classifier(tmp_path / "teacher")


def test_pair_is_one_text_that_reads_as_two(teacher: Path, tmp_path: Path) -> None:
    table = pd.DataFrame({"sentence1": ["the cat"], "sentence2": ["a dog"], "label": [1]})
    table.to_parquet(tmp_path / "validation.parquet")
    info, tokenizer = load_teacher_info(str(teacher), BuildConfig())
    texts = read_split("rte", GLUE["rte"], str(tmp_path), TEST, pair_separator(tokenizer))
    assert (texts.texts, texts.labels.tolist()) == (["the cat [SEP] a dog"], ["1"])
    tokens = ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]
    assert tokenizer.encode(texts.texts[0]).tokens == tokens
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": texts.texts[0]}) + "\n")
    (split,) = cut_splits(list_files((str(tmp_path / "corpus.jsonl"),)))
    write_passages(split, passage_spec(info, BuildConfig()), tokenizer, tmp_path / "p.parquet")
    ids = read_block(str(tmp_path / "p.parquet"), 0).ids.tolist()
    assert [tokenizer.id_to_token(i) for i in ids] == tokens  # the same in a dictionary's corpus


def test_glue_task_accepts_plain_data(tmp_path: Path) -> None:
    source = write_task(tmp_path / "d", {"train": [("a", "0")], "test": [("b", "1")], "dev": [("c", "0")]})
    splits = [read_split("sst2", GLUE["sst2"], source, split, "").texts for split in (TRAIN, TEST, DEV)]
    assert splits == [["a"], ["b"], ["c"]]
    with pytest.raises(InputError, match="sentence"):
        read_split("sst2", GLUE["sst2"], write_task(tmp_path / "e", {"train": []}), TRAIN, "")


def test_regression_needs_numbers(tmp_path: Path) -> None:
    source = write_task(tmp_path / "d", {"train": [("a", "0.5"), ("b", "2")], "test": [("a", "many")]})
    regression = get_task("x", regression=True)
    assert regression.metrics[0] == "Pearson"
    assert read_split("x", regression, source, TRAIN, "").labels.tolist() == [0.5, 2.0]
    with pytest.raises(InputError, match=r"number.*--regression"):
        read_split("x", regression, source, TEST, "")


def test_batches_are_a_seeded_permutation_of_similar_lengths() -> None:
    rows = [np.zeros(n, np.int64) for n in np.random.default_rng(0).integers(1, 50, 333)]
    first, again, other = ([b.tolist() for b in batches(rows, 8, seed)] for seed in ((0, 1), (0, 1), (0, 2)))
    assert sorted(i for batch in first for i in batch) == list(range(333))
    assert max(map(len, first)) <= 8
    assert first == again != other
    assert np.mean([np.ptp([len(rows[i]) for i in batch]) for batch in first]) < 5


def toy(folder: Path, train: int = 24, test: int = 12, shuffled: bool = False, values: bool = False) -> str:
    """Write texts on rivers and on money with their topic, a random topic, or 2 and -1 as label."""
    rng = np.random.default_rng(0)
    words = {"water": ["river", "deep", "near"], "coin": ["money", "full", "of"]}
    names = {"water": "2", "coin": "-1"} if values else {"water": "water", "coin": "coin"}

    def row(number: int) -> tuple[str, str]:
        topic = ("water", "coin")[number % 2]
        text = [*rng.choice(words[topic], 2), *rng.choice(["the", "cat", "mat", "is"], rng.integers(1, 5))]
        return " ".join(text), names[str(rng.choice(list(words))) if shuffled else topic]

    def rows(size: int) -> list[tuple[str, str]]:
        return [row(number) for number in range(size)]

    return write_task(folder, {"train": rows(train), "dev": rows(test), "test": rows(test)})


class Kept(DisturbedTraining):
    """Trains in this process, and keeps the settings and the number of trainings."""

    runs, settings = 0, None

    def train(self, name: str, worker: Callable, settings: object, folder: str) -> object:
        result = super().train(name, worker, settings, folder)
        self.runs, self.settings = self.runs + 1, settings
        return result


def tuning_in(folder: Path, teacher: Path) -> Tune:
    """Return a function that fine-tunes in this process."""
    kept = Kept()

    def tune(source: str, executor: Executor = kept, **changes: object) -> SimpleNamespace:
        given = {"task": f"toy={source}", "teacher": str(teacher), "epochs": 1, "dropout": 0.0, **SETTINGS}
        given |= {"output": str(folder / "out"), **changes}
        summary = finetune(validate_config(FinetuneConfig, given), executor)
        return SimpleNamespace(**summary, source=source, settings=kept.settings, runs=kept.runs)

    return tune


@pytest.fixture
def tune(teacher: Path, tmp_path: Path) -> Tune:
    return tuning_in(tmp_path, teacher)


@pytest.fixture(scope="module")
def learned(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A teacher that has learned the toy task; tests must not change it."""
    folder = tmp_path_factory.mktemp("learned")
    return tuning_in(folder, teacher)(toy(folder / "toy", **LEARN), epochs=6)


def own(folder: object, **changes: object) -> Spec:
    return Spec(**{"name": "t", "kind": "teacher", "teacher": str(folder), "dtype": "float32", **changes})


def measure(model: TokenModel, source: str, name: str = "toy") -> Result:
    return task.measure(model, source, name, own(model.spec.teacher), Columns())


def test_tuned_teacher_is_a_teacher_with_a_classifier(learned: SimpleNamespace, tmp_path: Path) -> None:
    info, _ = load_teacher_info(learned.teacher, BuildConfig())
    assert (info.pooling, info.normalize, info.max_length) == ("mean", False, 64)
    assert learned.epochs[-1]["dev_accuracy"] > 0.85
    assert learned.epochs[-1]["train_loss"] < 0.8 * learned.epochs[0]["train_loss"]
    corpus = [json.loads(line)["text"] for line in Path(learned.corpus).read_text().splitlines()]
    assert corpus == read_split("toy", get_task("toy"), learned.source, TRAIN, "").texts
    model = make_model(own(learned.teacher), "cpu", 1)
    library = make_model(Spec("st", "encoder", source=learned.teacher), "cpu", 1)
    np.testing.assert_allclose(library.encode(["the cat"]), model.encode(["the cat"]), rtol=1e-4, atol=1e-5)
    result, test = measure(model, learned.source), read_split("toy", get_task("toy"), learned.source, TEST, "")
    assert result.score > 0.85
    assert measure(model, toy(tmp_path / "noise", **LEARN, shuffled=True)).score < 0.75
    assert result.gold == test.labels.tolist()
    assert task.texts(learned.source, "toy", own(learned.teacher), Columns()) == test.texts


@pytest.mark.parametrize(
    ("kind", "pooling", "prompt", "changes"),
    [
        ("bert", "mean_tokens", "the cat is ", {}),
        ("roberta", None, None, {"pooling": "cls"}),
        ("t5", None, None, {}),
        ("llama", "lasttoken", None, {}),
    ],
)
def test_tuned_teacher_of_any_kind_reads_as_trained(
    tune: Tune, make_teacher: MakeTeacher, tmp_path: Path, kind: str, pooling: str, prompt: str, changes: dict
) -> None:
    result = tune(toy(tmp_path / "toy"), teacher=str(make_teacher(kind, pooling, prompt)), **changes)
    test, dev = (read_tokenized(result.settings, split) for split in (TEST, DEV))
    model = make_model(own(result.teacher), "cpu", 1)
    read = model.read(task.texts(result.source, "toy", own(result.teacher), Columns()))
    assert read.ids.tolist() == np.concatenate(test.rows).tolist()  # including the prompt
    body, classifier = load_body(Path(result.teacher), "tuned", torch.float32), load_classifier(result.teacher)
    labels = classifier.config.labels
    assert classifier.config.pooling == changes.get("pooling", "lasttoken" if kind == "llama" else "mean")

    def embed(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        ids, mask = pad_ids(rows)
        with torch.no_grad():
            hidden = body(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            return hidden, mask, [labels[i] for i in classifier(hidden, mask).argmax(1).tolist()]

    hidden, mask, predicted = embed(test.rows)
    torch.testing.assert_close(torch.from_numpy(read.hidden), hidden[mask], rtol=1e-4, atol=1e-4)
    assert measure(model, result.source).found == predicted
    accuracy = np.mean(dev.gold == np.array(embed(dev.rows)[2]))
    assert accuracy == pytest.approx(result.epochs[-1]["dev_accuracy"])  # as trained
    assert "| task | toy |" in (Path(result.teacher) / "README.md").read_text()


def test_replacing_by_exact_senses_changes_no_prediction(learned: SimpleNamespace, tmp_path: Path) -> None:
    model = make_model(own(learned.teacher), "cpu", 1)
    read = model.read(task.texts(learned.source, "toy", own(learned.teacher), Columns()))
    replaced = []
    for k in (500, 1):
        fitted = SenseDictionary.from_embeddings(
            read.ids, read.hidden, k=k, vocab_size=model.info.vocab_size, dtype="float32"
        )
        fitted.save(tmp_path / str(k))
        spec = own(learned.teacher, kind="replaced", source=str(tmp_path / str(k)), replace="hard")
        replaced.append(make_model(spec, "cpu", 1))
    exact, coarse = replaced
    assert measure(exact, learned.source).found == measure(model, learned.source).found
    assert len(measure(coarse, learned.source).found) == LEARN["test"]
    assert not np.allclose(coarse.encode(["the cat"]), model.encode(["the cat"]))


def test_regression_predicts_numbers(tune: Tune, tmp_path: Path) -> None:
    result = tune(toy(tmp_path / "toy", **LEARN, values=True), regression=True, epochs=6)
    assert result.epochs[-1]["dev_Pearson"] > 0.75
    measured = measure(make_model(own(result.teacher), "cpu", 1), result.source)
    assert measured.metric == "Pearson"
    assert measured.score > 0.75


@pytest.mark.slow
def test_mnli_reports_both_test_splits(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "mnli").mkdir()
    splits = (("train", 96, "01"), ("validation_matched", 40, "01"), ("validation_mismatched", 20, "10"))
    for split, size, labels in splits:
        rows = [(("the river", "deep", labels[0]), ("the cat", "money", labels[1]))[i % 2] for i in range(size)]
        table = pd.DataFrame(rows, columns=["premise", "hypothesis", "label"])
        table.to_parquet(tmp_path / "mnli" / f"{split}.parquet")
    source = str(tmp_path / "mnli")
    folder = tune(source, task=f"mnli={source}", epochs=6).teacher
    assert load_classifier(folder).config.joiner == " [SEP] "
    model = make_model(own(folder), "cpu", 1)
    measured = measure(model, source, "mnli")
    assert (measured.score, len(measured.gold or [])) == (1.0, 40)
    assert measured.more["accuracy, validation_mismatched"] == 0.0
    (tmp_path / "mnli" / "validation_mismatched.parquet").unlink()
    assert set(measure(model, source, "mnli").more) == {"macro F1"}


def test_gradients_of_two_workers_average_to_those_of_one(learned: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ProcessGroup, "sum", lambda self, values, device: values)

    def gradients(group: ProcessGroup) -> list[torch.Tensor]:
        tuner = Finetuner(learned.settings, group)
        tuner.model.eval()  # the body's own dropout is random
        tuner.backward(np.arange(7))
        return [p.grad.clone() for p in tuner.model.parameters() if p.grad is not None]

    groups = (ProcessGroup(), ProcessGroup(0, 2), ProcessGroup(1, 2))
    for whole, first, second in zip(*map(gradients, groups), strict=True):
        torch.testing.assert_close((first + second) / 2, whole, rtol=1e-4, atol=1e-6)


def test_only_a_changed_command_trains_again(tune: Tune, tmp_path: Path) -> None:
    source = toy(tmp_path / "toy")
    stamp = Path(tune(source).corpus).stat().st_mtime_ns
    assert tune(source, workers=3).runs == 1
    changed = tune(source, lr=1e-3)
    assert changed.runs == 2
    assert Path(changed.corpus).stat().st_mtime_ns == stamp  # dictionaries of this corpus stay valid
    with (Path(source) / "train.csv").open("a") as file:
        file.write("the cat,water\n")
    assert tune(source, lr=1e-3).runs == 3


def test_failed_command_keeps_the_previous_result_until_it_writes(tune: Tune, tmp_path: Path) -> None:
    source, other, given = toy(tmp_path / "toy"), toy(tmp_path / "other", shuffled=True), {"epochs": 2, "dropout": 0.1}
    first = tune(source, **given)
    corpus = Path(first.corpus).read_text()
    for place in ("training", "publish teacher"):
        assert tune(source, **given).runs == 1
        assert Path(first.corpus).read_text() == corpus
        with pytest.raises(StoppedError):
            tune(other, stopping(place))
    with pytest.raises(StoppedError):  # at the end of the second epoch: the next run resumes after the first
        tune(source, DisturbedTraining(stopped, 2), **given)
    again = tune(source, **given)
    assert again.runs == 2  # the second failure left the other command's corpus
    assert without_speed(again.epochs) == without_speed(first.epochs)
    assert Path(again.corpus).read_text() == corpus
    shutil.rmtree(again.teacher)
    assert tune(source, **given).runs == 3


def without_speed(epochs: list[dict]) -> list[dict]:
    return [epoch | {"tokens_per_s": 0} for epoch in epochs]


def test_nothing_of_a_previous_teacher_remains(tune: Tune, make_teacher: MakeTeacher, tmp_path: Path) -> None:
    source = toy(tmp_path / "toy")
    folder = tune(source, teacher=str(make_teacher("bert", "mean_tokens", "the cat is "))).teacher
    assert load_teacher_info(folder, BuildConfig())[0].prompt == "the cat is "
    assert tune(source, teacher=str(make_teacher("bert", "mean_tokens"))).runs == 2
    assert load_teacher_info(folder, BuildConfig())[0].prompt == ""
    tune(source, teacher=str(make_teacher("bert", "cls_token")))  # the same weights
    assert load_classifier(folder).config.pooling == "cls"


def test_input_and_foreign_folders_are_not_replaced(tune: Tune, teacher: Path, tmp_path: Path) -> None:
    source = toy(tmp_path / "toy")
    shutil.copytree(teacher, tmp_path / "out" / "teacher")
    with pytest.raises(InputError, match="not written by `msense finetune`"):
        tune(source)
    with pytest.raises(InputError, match="is the folder to be written"):
        tune(source, teacher=str(tmp_path / "out" / "teacher"))
    for path in teacher.iterdir():
        assert (tmp_path / "out" / "teacher" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "toy"}, "NAME=DATA"),
        ({"task": "=x"}, "NAME=DATA"),
        ({"task": "toy=/nowhere"}, "nowhere"),
        ({"task": "sst2={data}", "regression": True}, "sst2 is a classification: remove --regression"),
        ({"label_column": "tag"}, "no column 'tag'"),
        ({"label_column": "text"}, "both text and label"),
        ({"output": "s3://bucket/run"}, "must be a local folder"),
    ],
)
def test_invalid_command_is_refused(changes: dict, message: str, teacher: Path, tmp_path: Path) -> None:
    source = write_task(tmp_path / "d", {"train": [("a", "x")], "test": [("a", "x")]})
    given = {"task": "toy={data}", "teacher": str(teacher), "output": str(tmp_path / "o"), **changes}
    given["task"] = given["task"].replace("{data}", source)
    with pytest.raises(InputError, match=message):
        finetune(validate_config(FinetuneConfig, given))


def test_classifier_of_another_width_or_kind_is_refused(teacher: Path, tmp_path: Path) -> None:
    rows = [("the cat", "no"), ("a dog", "yes")]
    source = write_task(tmp_path / "toy", {"train": rows, "test": rows})
    shutil.copytree(teacher, tmp_path / "teacher")
    save_classifier(tmp_path / "teacher", known_classifier())
    model = make_model(own(tmp_path / "teacher"), "cpu", 1)
    for data, name, message in (
        (source, "toy", r"width 16.*takes 2"),
        (toy(tmp_path / "other"), "toy", "'water'.* labels such as 'no'"),
        (source, "rte", "has text pairs"),
        (source, "stsb", "predicts labels"),
    ):
        with pytest.raises(InputError, match=message):
            measure(model, data, name)


@pytest.mark.slow
def test_two_workers_on_ray_train_as_one(ray: None, tune: Tune, teacher: Path, tmp_path: Path) -> None:
    source, given = toy(tmp_path / "toy", train=96), {"epochs": 3, "output": str(tmp_path / "two")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(teacher.parent)  # Ray's workers run in another folder
        two = tune(source, RayExecutor.connect(2), teacher=teacher.name, **given)
    one = tune(source, epochs=3)
    for actual, expected in zip(*map(without_speed, (two.epochs, one.epochs)), strict=True):
        assert actual == pytest.approx(expected, rel=1e-2, abs=1e-2)
    actual, expected = (load_classifier(summary.teacher).state_dict() for summary in (two, one))
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def test_a_training_is_named_after_its_dev_split_too(learned: SimpleNamespace) -> None:
    settings, (info, _) = learned.settings, load_teacher_info(learned.teacher, BuildConfig())
    texts = read_split("toy", get_task("toy"), learned.source, TRAIN, "")
    splits = (None, texts, replace(texts, fingerprints=("another",)))
    assert len({_name(settings.config, info, texts, dev, settings) for dev in splits}) == 3


def test_a_tuned_teacher_copies_no_file_from_outside(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    source = Path(shutil.copytree(make_teacher("bert", "mean_tokens"), tmp_path / "source"))
    (tmp_path / "secret").write_text("secret")
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    (source / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    body = load_body(source, "source", torch.float32)
    save_teacher(tmp_path / "tuned", body, Classifier(known_classifier().config), source, 64, {})
    assert (tmp_path / "tuned" / "tokenizer.json").is_file()
    assert not (tmp_path / "tuned" / "special_tokens_map.json").exists()
