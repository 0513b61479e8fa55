"""Training of students: it learns, goes on from a checkpoint to the same numbers, and says what went wrong."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from faulty import Corpus, Outcome, flip_a_byte
from safetensors.torch import load_file, save_file

from msense import SenseEncoder, distill, distill_run, storage, train_loop
from msense.dictionary import SenseDictionary
from msense.distill_config import DistillConfig
from msense.distill_run import distill_student
from msense.errors import BadInput, MsenseError
from msense.label_set import LabelSet
from msense.losses import Mix
from msense.ray_train import _cause
from msense.student import StudentSettings, load_student, save_student
from msense.student.narrow import widen
from msense.train_engine import Plain, Zero
from msense.train_loop import Trainer, Training, new_student, rate

SETTINGS = {"epochs": 3, "batch_tokens": 256, "lr": 5e-3, "held_out": 0.2, "dtype": "float32"}


@pytest.fixture
def training(made: Corpus, in_process: None, monkeypatch: pytest.MonkeyPatch) -> Training:
    """A run with labels, and the settings of a training on it."""
    monkeypatch.setattr(distill_run, "train", lambda *_: {})
    made.build("dict", max_occurrences=60)
    run = made.folder / "run"
    given = {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), "output": str(run)}
    distill_student(DistillConfig(**given, **SETTINGS))
    return Training(
        run=str(run), dictionary=str(made.folder / "dict" / "dictionary"), teacher=str(made.teacher), revision=None,
        teacher_dtype="float32", deepspeed_stage=0, checkpoint_steps=1000,
        student=StudentSettings(kind="static"), mix=Mix(sense=1, pooled=50), train_embeddings=False, epochs=3,
        batch_tokens=256, accumulate=1,
        lr=5e-3, schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0, dtype="float32", seed=0, device="cpu",
        threads=1,
    )  # fmt: skip


def trainer_of(training: Training) -> Trainer:
    """One worker, in this process."""
    labels = LabelSet.open(training.run)
    student, given = new_student(training, labels), (training.weight_decay, training.clip)
    stage = training.deepspeed_stage
    return Trainer(training, Zero(student, *given, stage, "cpu") if stage else Plain(student, *given), labels)


def trained(training: Training, checkpoint: Path | None = None, stop: int = 99) -> Trainer:
    """Train in this process, from a checkpoint on, until so many checkpoints were due."""
    trainer = trainer_of(training)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    for number, _ in enumerate(trainer.run(), 1):
        if number == stop:
            break
    return trainer


@pytest.mark.parametrize("kind", ["static", "layers:1"])
def test_students_learn_sentences_and_senses(training: Training, kind: str) -> None:
    training = replace(training, student=StudentSettings(kind=kind), epochs=6)
    trainer = trained(training)
    history = trainer.state.history
    assert [int(metrics["epoch"]) for metrics in history] == [1, 2, 3, 4, 5, 6]
    first, last = history[0], history[-1]
    assert last["train_sense"] < first["train_sense"]
    assert last["train_pooled"] < first["train_pooled"]
    untrained = trainer_of(training).evaluate()
    assert last["held_out_pooled_cosine"] > untrained["held_out_pooled_cosine"]
    assert last["held_out_sense"] < untrained["held_out_sense"]
    assert last["held_out_frequent"] == untrained["held_out_frequent"]


def test_a_transformers_tokens_stay_as_they_are_unless_asked_for(training: Training) -> None:
    training = replace(training, student=StudentSettings(kind="layers:1"), epochs=1)
    began, ended = (student.body.model.state_dict() for student in (new_student(training), trained(training).student))
    still = {name for name, tensor in began.items() if torch.equal(tensor, ended[name])}
    assert still == {"embeddings.word_embeddings.weight"}


@pytest.mark.parametrize(("kind", "stop"), [("static", 1), ("static", 2), ("layers:1", 3)])
def test_a_checkpoint_goes_on_to_the_same_numbers(training: Training, tmp_path: Path, kind: str, stop: int) -> None:
    """Also in the middle of an epoch, with much weight decay, and with dropout."""
    training = replace(training, student=StudentSettings(kind=kind), weight_decay=1.0, checkpoint_steps=3)
    whole = trained(training).state.history
    trained(training, stop=stop).save(tmp_path / "checkpoint")
    assert sorted(p.name for p in (tmp_path / "checkpoint").rglob("*") if p.is_file()) == [
        "state.json", "tensors.safetensors", "tensors.sha256",
    ]  # fmt: skip
    held = set(load_file(tmp_path / "checkpoint" / "tensors.safetensors"))
    assert "student.head.weight" in held
    assert "student.body.model.embeddings.word_embeddings.weight" not in held  # no step moves it
    torch.manual_seed(99)
    again = trained(training, tmp_path / "checkpoint").state.history
    for a, b in zip(whole, again, strict=True):
        timed = {"tokens_per_s"}
        assert {k: v for k, v in a.items() if k not in timed} == pytest.approx(
            {k: v for k, v in b.items() if k not in timed}, rel=1e-6
        )


@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_losses_on_hidden_states_ask_the_teacher(training: Training, name: str) -> None:
    training = replace(training, student=StudentSettings(kind="layers:1", heads="one"), mix=Mix(**{name: 1}))
    history = trained(training).state.history
    assert history[-1][f"train_{name}"] < 0.8 * history[0][f"train_{name}"]
    assert history[-1]["held_out_pooled_cosine"] > trainer_of(training).evaluate()["held_out_pooled_cosine"]
    whole = replace(training, student=StudentSettings(kind="layers:2", heads="one"))
    assert trainer_of(whole).evaluate()[f"held_out_{name}"] == pytest.approx(0, abs=1e-5)  # it is the teacher


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Torch's, of this process alone; DeepSpeed keeps hold of it."""
    from deepspeed.ops import __compatible_ops__

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # as Ray Train sets it
        patch.setitem(
            __compatible_ops__, "deepspeed_shm_comm", False
        )  # minutes of compiling for a process that is alone
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("stage", "kind"), [(1, "static"), (2, "static"), (2, "layers:1"), (3, "static"), (3, "layers:1")]
)
def test_deepspeed_gives_the_same_numbers_and_goes_on(
    training: Training, process_group: None, tmp_path: Path, stage: int, kind: str
) -> None:
    plain = replace(training, accumulate=3, epochs=2, student=StudentSettings(kind=kind))
    training = replace(plain, deepspeed_stage=stage)
    whole = trained(training).state.history
    trained(training, stop=1).save(tmp_path / "checkpoint")
    again = trained(training, tmp_path / "checkpoint").state.history
    wanted = trained(plain).state.history
    for name in ("train_sense", "train_pooled", "held_out_sense", "held_out_accuracy"):
        assert again[1][name] == pytest.approx(whole[1][name], rel=1e-5)
        assert whole[1][name] == pytest.approx(wanted[1][name], rel=1e-3)
    state = str(tmp_path / "checkpoint" / "state.json")
    told = storage.read_json(state)
    storage.write_json(state, {**told, "workers": 2})
    with pytest.raises(BadInput, match=r"was made by 2 workers, .*: give --workers 2, or delete it"):
        trained(training, tmp_path / "checkpoint")
    storage.write_json(state, told)
    shutil.rmtree(tmp_path / "checkpoint" / "zero")
    with pytest.raises(BadInput, match=r"the checkpoint .* is damaged"):
        trained(training, tmp_path / "checkpoint")


def test_slices_of_a_batch_add_up_to_it(training: Training) -> None:
    one = trained(training, stop=1).state.history
    many = trained(replace(training, accumulate=4), stop=1).state.history
    for name in ("train_sense", "train_pooled", "held_out_sense", "held_out_pooled"):
        assert many[0][name] == pytest.approx(one[0][name], rel=1e-4)


@pytest.mark.parametrize("damage", ["state", "foreign", "file cut short", "file gone", "byte flipped"])
def test_damaged_checkpoints_are_told(training: Training, tmp_path: Path, damage: str, outcome: Outcome) -> None:
    folder = tmp_path / "checkpoint"
    trained(training, stop=1).save(folder)
    tensors = folder / "tensors.safetensors"
    if damage == "state":
        (folder / "state.json").write_text('{"epoch": "one"}')
    elif damage == "file cut short":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif damage == "byte flipped":
        flip_a_byte(tensors)
    elif damage == "foreign":
        save_file({"student.body.other": torch.zeros(2)}, tensors)
        (folder / "tensors.sha256").write_text(storage.sha256_of(tensors))
    else:
        tensors.unlink()
    told = r"the checkpoint .* is damaged .*delete .*, and the same command trains from the beginning"
    with pytest.raises(BadInput, match=told):
        trained(training, folder)
    if damage not in ("state", "foreign"):
        outcome(damage, "training", "told; trained again")


def test_losses_and_gradients_that_are_not_finite_are_told(training: Training) -> None:
    broken = trainer_of(training)
    with torch.no_grad():
        broken.student.body.shift.weight.fill_(float("inf"))
    with pytest.raises(MsenseError, match=r"the loss is not finite .*smaller --lr"):
        next(broken.run())
    other = trainer_of(training)
    for parameter in other.student.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    with pytest.raises(MsenseError, match=r"a gradient is not finite: give a smaller --lr"):
        other.engine.step(1e-3)


@pytest.mark.parametrize("kind", ["static", "layers:1"])
def test_narrow_tables_learn_what_whole_ones_do(
    training: Training, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training = replace(training, student=StudentSettings(kind=kind), epochs=1, train_embeddings=True)
    narrowed = trained(training).student
    table = narrowed.body.shift if kind == "static" else narrowed.body.model.get_input_embeddings()
    met = table.tokens
    assert 0 < len(table.weight) == len(met) < narrowed.config.vocab_size
    widen(narrowed)
    began = new_student(training)
    monkeypatch.setattr(train_loop, "narrow", lambda *_: None)
    whole = trained(training).student
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(narrowed.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    name = "body.shift.weight" if kind == "static" else "body.model.embeddings.word_embeddings.weight"
    moved = (narrowed.state_dict()[name] != began.state_dict()[name]).any(1)
    assert moved[met].any()
    never = torch.ones(len(moved), dtype=torch.bool)
    never[met] = False
    assert never.any()
    assert not moved[never].any()
    save_student(tmp_path / "student", narrowed)
    ids = torch.arange(narrowed.config.vocab_size)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        loaded = load_student(tmp_path / "student")(ids, mask).hidden
        torch.testing.assert_close(loaded, narrowed.eval()(ids, mask).hidden, rtol=1e-4, atol=1e-6)


def test_a_student_that_cannot_be_made_is_told_before_anything_is_labelled(training: Training) -> None:
    run = Path(training.run)
    again = {"dictionary": str(run.parent / "dict"), "teacher": training.teacher, "output": str(run.parent / "other")}
    with pytest.raises(BadInput, match=r"'layers:99': the teacher has 2 layers"):
        distill_student(DistillConfig(**again, **SETTINGS, student="layers:99"))
    assert not (run.parent / "other" / "labels").exists()


def test_the_cause_of_a_failed_worker_is_its_last_line() -> None:
    failed = RuntimeError("a worker failed")
    failed.__cause__ = MsenseError("first line\nthe loss is not finite")
    assert _cause(failed) == "the loss is not finite"
    assert _cause(RuntimeError()) == "RuntimeError"
    page = "Memory on the node was 23 GB.\nRefer to the documentation on how to address the out of memory issue: ... . Set ..."
    assert _cause(RuntimeError(page)).startswith("the machine ran out of memory, and Ray killed a worker; ")


def test_learning_rates_rise_and_fall() -> None:
    found = [rate(step, 100, 0.1, "cosine") for step in range(100)]
    assert found.index(max(found)) == 10
    assert max(found) == 1.0
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] < 0.01
    assert {rate(step, 100, 0.1, "constant") for step in range(10, 100)} == {1.0}
    assert rate(55, 100, 0.1, "linear") == pytest.approx(0.5)


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=101, pct_start=31 / 101)
    for step in range(100):
        assert 2 * rate(step, 100, 0.3, "one-cycle") == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        schedule.step()


def test_distilling_on_ray_with_two_workers(
    ray: None, made: Corpus, in_process: None, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.build("dict", senses=3)
    monkeypatch.undo()
    given = {"dictionary": str(made.folder / "dict"), "teacher": str(made.teacher), "student": "static", "workers": 2}
    run = made.folder / "run"

    def cut_off(*_: object) -> None:
        raise MsenseError("cut off")

    patch.setattr(distill, "ship_student", cut_off)
    with pytest.raises(MsenseError, match="cut off"):  # a training that is finished, and no student yet
        distill_student(DistillConfig(**given, **SETTINGS, output=str(run)))
    patch.undo()
    trained_once = (run / "metrics.jsonl").stat().st_mtime_ns
    summary = distill_student(DistillConfig(**given, **SETTINGS, output=str(run)))
    assert (run / "metrics.jsonl").stat().st_mtime_ns == trained_once
    facts = summary["stages"]["training"]
    assert facts["epochs"] == 3
    assert facts["held out accuracy"] > facts["held out frequent"] / 2
    assert not list((run / "training").glob("[0-9a-f]*"))  # checkpoints are gone
    encoder = SenseEncoder.from_pretrained(run / "student")
    assert encoder.encode(["the bank of the river"]).shape == (1, encoder.config.dim)
    assert encoder.tokens("the bank of the river")[1].sense is not None
    assert "held out accuracy" in (run / "student" / "README.md").read_text()
    student = load_student(run / "student")
    assert student.config.dim == SenseDictionary.load(run.parent / "dict" / "dictionary").dim
    before = (run / "student" / "model.safetensors").stat().st_mtime_ns
    again = distill_student(DistillConfig(**given, **SETTINGS, output=str(run)))
    assert again["stages"]["training"] | {"seconds": 0} == facts | {"seconds": 0}
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == before
    ids = torch.from_numpy(np.arange(5)[None])
    copied = made.folder / "copy"
    save_student(copied, student)
    assert torch.equal(
        student(ids, torch.ones_like(ids, dtype=torch.bool)).hidden,
        load_student(copied)(ids, torch.ones_like(ids, dtype=torch.bool)).hidden,
    )
