"""Training of students: they learn, resume from checkpoints to the same numbers, and report failures."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faulty import Corpus, MakeTeacher, Outcome, flip_a_byte
from msense.stages.ray_train import _cause
from safetensors.torch import load_file, save_file

from msense import SenseEncoder
from msense.config.distill import DistillConfig
from msense.dictionary import SenseDictionary
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.pipelines import distill as distill_module
from msense.pipelines.distill import distill_student
from msense.stages import train
from msense.student import StudentSettings, load_student, save_student
from msense.student.pruning import restore_embeddings
from msense.training import distiller
from msense.training.distiller import DistillationConfig, Trainer, build_student
from msense.training.engine import DDPEngine, DeepSpeedEngine
from msense.training.label_dataset import LabelSet
from msense.training.losses import LossWeights
from msense.training.schedule import lr_factor

SETTINGS = {"epochs": 3, "batch_tokens": 256, "lr": 5e-3, "held_out": 0.2, "dtype": "float32"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_teacher: MakeTeacher) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("training"), make_teacher("bert"))


@pytest.fixture
def training(corpus: Corpus, in_process: None, monkeypatch: pytest.MonkeyPatch) -> DistillationConfig:
    """Settings of a training on a run with labels, which the first test builds for all."""
    folder, teacher = corpus.folder, str(corpus.teacher)
    if not (folder / "run").exists():
        monkeypatch.setattr(distill_module, "train", lambda *_: {})
        corpus.build("dict", max_occurrences=60)
        given = {"dictionary": str(folder / "dict"), "teacher": teacher, "output": str(folder / "run")}
        distill_student(DistillConfig(**given, **SETTINGS))
    return DistillationConfig(
        run=str(folder / "run"), dictionary=str(folder / "dict" / "dictionary"), teacher=teacher, revision=None,
        teacher_dtype="float32", deepspeed_stage=0, checkpoint_steps=1000,
        student=StudentSettings(kind="static"), mix=LossWeights(sense=1, pooled=50), train_embeddings=False, epochs=3,
        batch_tokens=256, accumulate=1, lr=5e-3, schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0,
        dtype="float32", seed=0, device="cpu", threads=1,
    )  # fmt: skip


def trainer_of(training: DistillationConfig) -> Trainer:
    labels = LabelSet.open(training.run)
    student, given = build_student(training, labels), (training.weight_decay, training.clip)
    stage = training.deepspeed_stage
    return Trainer(
        training, DeepSpeedEngine(student, *given, stage, "cpu") if stage else DDPEngine(student, *given), labels
    )


def trained(training: DistillationConfig, checkpoint: Path | None = None, stop: int = 99) -> Trainer:
    """Train in this process, from a checkpoint on, until `stop` checkpoints have been due."""
    trainer = trainer_of(training)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    for number, _ in enumerate(trainer.run(), 1):
        if number == stop:
            break
    return trainer


@pytest.mark.parametrize("kind", ["static", "layers:1"])
def test_students_learn_sentences_and_senses(training: DistillationConfig, kind: str) -> None:
    training = replace(training, student=StudentSettings(kind=kind), epochs=6)
    trainer = trained(training)
    history = trainer.state.history
    assert [int(metrics["epoch"]) for metrics in history] == [1, 2, 3, 4, 5, 6]
    first, last, untrained = history[0], history[-1], trainer_of(training)
    before = untrained.evaluate()
    assert last["train_sense"] < first["train_sense"]
    assert last["train_pooled"] < first["train_pooled"]
    assert last["held_out_pooled_cosine"] > before["held_out_pooled_cosine"]
    assert last["held_out_sense"] < before["held_out_sense"]
    assert last["held_out_frequent"] == before["held_out_frequent"]
    if kind != "static":  # --train-embeddings is off
        began, ended = (student.body.model.state_dict() for student in (untrained.student, trainer.student))
        unchanged = {name for name, tensor in began.items() if torch.equal(tensor, ended[name])}
        assert unchanged == {"embeddings.word_embeddings.weight"}


@pytest.mark.parametrize(("kind", "stop"), [("static", 1), ("static", 2), ("layers:1", 3)])
def test_a_resumed_training_gives_the_same_numbers(
    training: DistillationConfig, tmp_path: Path, kind: str, stop: int
) -> None:
    """Also in the middle of an epoch, with large weight decay, and with dropout."""
    training = replace(training, student=StudentSettings(kind=kind), weight_decay=1.0, checkpoint_steps=3, epochs=2)
    whole = trained(training).state.history
    trained(training, stop=stop).save(tmp_path / "checkpoint")
    names = {"state.json", "tensors.safetensors", "tensors.sha256"}
    assert {p.name for p in (tmp_path / "checkpoint").rglob("*") if p.is_file()} == names
    stored = set(load_file(tmp_path / "checkpoint" / "tensors.safetensors"))
    assert "student.head.weight" in stored
    assert "student.body.model.embeddings.word_embeddings.weight" not in stored  # it is not trained
    torch.manual_seed(99)
    resumed = trained(training, tmp_path / "checkpoint").state.history
    for metrics in (*whole, *resumed):
        del metrics["tokens_per_s"]
    assert len(resumed) == len(whole) == 2
    for a, b in zip(whole, resumed, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_hidden_state_losses_approach_the_teacher(training: DistillationConfig, name: str) -> None:
    training = replace(training, student=StudentSettings(kind="layers:1", heads="one"), mix=LossWeights(**{name: 1}))
    history = trained(training).state.history
    assert history[-1][f"train_{name}"] < 0.8 * history[0][f"train_{name}"]
    assert history[-1]["held_out_pooled_cosine"] > trainer_of(training).evaluate()["held_out_pooled_cosine"]
    teacher = replace(training, student=StudentSettings(kind="layers:2", heads="one"))  # all layers of the teacher
    assert trainer_of(teacher).evaluate()[f"held_out_{name}"] == pytest.approx(0, abs=1e-5)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Torch's process group of this process alone; DeepSpeed keeps a reference to it."""
    from deepspeed.ops import __compatible_ops__

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # as Ray Train sets it
        patch.setitem(__compatible_ops__, "deepspeed_shm_comm", False)  # takes minutes to compile
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("stage", "kind"), [(1, "static"), (2, "layers:1"), (3, "static"), (3, "layers:1")])
def test_deepspeed_equals_adamw_and_resumes(
    training: DistillationConfig, process_group: None, tmp_path: Path, stage: int, kind: str
) -> None:
    plain = replace(training, accumulate=3, epochs=2, student=StudentSettings(kind=kind))
    training, checkpoint = replace(plain, deepspeed_stage=stage), tmp_path / "checkpoint"
    whole = trained(training).state.history
    trained(training, stop=1).save(checkpoint)
    resumed = trained(training, checkpoint).state.history
    wanted = trained(plain).state.history
    for name in ("train_sense", "train_pooled", "held_out_sense", "held_out_accuracy"):
        assert resumed[1][name] == pytest.approx(whole[1][name], rel=1e-5)
        assert whole[1][name] == pytest.approx(wanted[1][name], rel=1e-3)
    state = str(checkpoint / "state.json")
    found = storage.read_json(state)
    storage.write_json(state, {**found, "workers": 2})
    with pytest.raises(InputError, match=r"was written by 2 workers, .*: use --workers 2, or delete the checkpoint"):
        trained(training, checkpoint)
    storage.write_json(state, found)
    shutil.rmtree(checkpoint / "zero")
    with pytest.raises(InputError, match=r"the checkpoint .* is corrupted"):
        trained(training, checkpoint)


def test_slices_of_a_batch_add_up_to_it(training: DistillationConfig) -> None:
    one, many = (trained(replace(training, accumulate=n), stop=1).state.history[0] for n in (1, 4))
    for name in ("train_sense", "train_pooled", "held_out_sense", "held_out_pooled"):
        assert many[name] == pytest.approx(one[name], rel=1e-4)


def foreign(tensors: Path) -> None:
    save_file({"student.body.other": torch.zeros(2)}, tensors)
    tensors.with_suffix(".sha256").write_text(storage.sha256_of(tensors))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "state": lambda tensors: tensors.with_name("state.json").write_text('{"epoch": "one"}'),
    "foreign": foreign,
    "file cut short": lambda tensors: os.truncate(tensors, tensors.stat().st_size // 2),
    "file gone": Path.unlink,
    "byte flipped": flip_a_byte,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupted_checkpoints_are_refused(
    training: DistillationConfig, corpus: Corpus, tmp_path: Path, damage: str, outcome: Outcome
) -> None:
    saved = corpus.folder / "checkpoint"
    if not saved.exists():
        trained(training, stop=1).save(saved)
    shutil.copytree(saved, tmp_path / "checkpoint")
    DAMAGES[damage](tmp_path / "checkpoint" / "tensors.safetensors")
    with pytest.raises(InputError, match=r"the checkpoint .* is corrupted .*delete .* to train from the beginning"):
        trainer_of(training).restore(tmp_path / "checkpoint")
    if damage not in ("state", "foreign"):
        outcome(damage, "training", "told; trained again")


def test_losses_and_gradients_that_are_not_finite_end_the_training(training: DistillationConfig) -> None:
    broken, other = trainer_of(training), trainer_of(training)
    with torch.no_grad():
        broken.student.body.shift.weight.fill_(float("inf"))
    with pytest.raises(MsenseError, match=r"the loss is not finite .*smaller --lr"):
        next(broken.run())
    for parameter in other.student.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    with pytest.raises(MsenseError, match=r"a gradient is not finite: use a smaller --lr"):
        other.engine.step(1e-3)


@pytest.mark.parametrize("kind", ["static", "layers:1"])
def test_pruned_embedding_tables_learn_as_whole_ones_do(
    training: DistillationConfig, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training = replace(training, student=StudentSettings(kind=kind), epochs=1, train_embeddings=True)
    pruned = trained(training).student
    table = pruned.body.shift if kind == "static" else pruned.body.model.get_input_embeddings()
    present = table.tokens
    assert 0 < len(table.weight) == len(present) < pruned.config.vocab_size
    restore_embeddings(pruned)
    began = build_student(training)
    monkeypatch.setattr(distiller, "narrow", lambda *_: None)
    whole = trained(training).student
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    name = "body.shift.weight" if kind == "static" else "body.model.embeddings.word_embeddings.weight"
    moved = (pruned.state_dict()[name] != began.state_dict()[name]).any(1)
    absent = torch.ones(len(moved), dtype=torch.bool)
    absent[present] = False
    assert moved[present].any()
    assert absent.any()
    assert not moved[absent].any()
    save_student(tmp_path / "student", pruned)
    ids = torch.arange(pruned.config.vocab_size)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        loaded = load_student(tmp_path / "student")(ids, mask).hidden
        torch.testing.assert_close(loaded, pruned.eval()(ids, mask).hidden, rtol=1e-4, atol=1e-6)


def test_an_invalid_student_is_refused_before_labelling(training: DistillationConfig, tmp_path: Path) -> None:
    given = {"dictionary": training.dictionary, "teacher": training.teacher, "output": str(tmp_path / "run")}
    with pytest.raises(InputError, match=r"'layers:99': the teacher has 2 layers"):
        distill_student(DistillConfig(**given, **SETTINGS, student="layers:99"))
    assert not (tmp_path / "run" / "labels").exists()


def test_the_cause_of_a_failed_worker_is_its_last_line() -> None:
    failed = RuntimeError("a worker failed")
    failed.__cause__ = MsenseError("first line\nthe loss is not finite")
    assert _cause(failed) == "the loss is not finite"
    assert _cause(RuntimeError()) == "RuntimeError"
    page = "Memory on the node was 23 GB.\nRefer to the documentation on how to address the out of memory issue: ..."
    assert _cause(RuntimeError(page)).startswith("the machine ran out of memory and Ray killed a worker; ")


def test_learning_rates_rise_and_fall() -> None:
    rates = [lr_factor(step, 100, 0.1, "cosine") for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01
    assert {lr_factor(step, 100, 0.1, "constant") for step in range(10, 100)} == {1.0}
    assert lr_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)


def test_one_cycle_equals_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=101, pct_start=31 / 101)
    for step in range(100):
        assert 2 * lr_factor(step, 100, 0.3, "one-cycle") == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        schedule.step()


def test_distilling_on_ray_with_two_workers(
    ray: None, made: Corpus, in_process: None, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.build("dict", senses=3)
    monkeypatch.undo()
    run = made.folder / "run"
    given = {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), "output": str(run), "workers": 2}
    config = DistillConfig(**given, **SETTINGS, student="static")

    def interrupt(*_: object) -> None:
        raise MsenseError("interrupted")

    patch.setattr(train, "ship_student", interrupt)
    with pytest.raises(MsenseError, match="interrupted"):  # after the training, before the student is written
        distill_student(config)
    patch.undo()
    trained_at = (run / "metrics.jsonl").stat().st_mtime_ns
    stats = distill_student(config)["stages"]["training"]
    assert (run / "metrics.jsonl").stat().st_mtime_ns == trained_at
    assert stats["epochs"] == 3
    assert stats["held out accuracy"] > stats["held out frequent"] / 2
    assert not list((run / "training").glob("[0-9a-f]*"))  # checkpoints are removed
    encoder = SenseEncoder.from_pretrained(run / "student")
    assert encoder.config.dim == SenseDictionary.load(made.folder / "dict").dim
    assert encoder.encode(["the bank of the river"]).shape == (1, encoder.config.dim)
    assert encoder.tokens("the bank of the river")[1].sense is not None
    assert "held out accuracy" in (run / "student" / "README.md").read_text()
    written_at = (run / "student" / "model.safetensors").stat().st_mtime_ns
    again = distill_student(config)["stages"]["training"]
    assert again | {"seconds": 0} == stats | {"seconds": 0}
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == written_at
