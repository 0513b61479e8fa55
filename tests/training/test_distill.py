"""Training of students: they learn, resume from checkpoints to the same numbers, and report failures."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from executors import StoppedError, small_partitions, stopping
from faulty import DAMAGES, Corpus, MakeTeacher, Outcome
from safetensors.torch import load_file, save_file

from msense import SenseDictionary, SenseEncoder
from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.student import StudentSettings, load_student, save_student
from msense.student.pruning import restore_embeddings
from msense.training import distiller
from msense.training.distiller import DistillationConfig, Trainer, build_student
from msense.training.engine import DDPEngine, DeepSpeedEngine
from msense.training.label_dataset import LabelSet
from msense.training.loop import lr_factor
from msense.training.losses import LossWeights

MIXER = ("project.weight", "taps", "passage.weight", "passage.bias", "back.weight", "back.bias")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_teacher: MakeTeacher) -> Corpus:
    """A corpus with labels in "run"."""
    corpus = Corpus(tmp_path_factory.mktemp("training"), make_teacher("bert"))
    with small_partitions():
        corpus.build("dict", max_occurrences=60)
        corpus.label("run", held_out=0.2)
    return corpus


@pytest.fixture
def training(corpus: Corpus) -> DistillationConfig:
    return DistillationConfig(
        run=str(corpus.folder / "run"), dictionary=str(corpus.folder / "dict" / "dictionary"),
        teacher=str(corpus.teacher), revision=None, teacher_dtype="float32", deepspeed_stage=0, checkpoint_steps=1000,
        student=StudentSettings(kind="static"), mix=LossWeights(sense=1, pooled=50), train_embeddings=False, epochs=3,
        batch_tokens=256, accumulate=1, lr=5e-3, schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0,
        dtype="float32", seed=0, device="cpu", threads=1,
    )  # fmt: skip


def trainer_of(training: DistillationConfig) -> Trainer:
    labels = LabelSet.open(training.run)
    student, given = build_student(training, labels), (training.weight_decay, training.clip)
    stage = training.deepspeed_stage
    engine = DeepSpeedEngine(student, *given, stage, "cpu") if stage else DDPEngine(student, *given)
    return Trainer(training, engine, labels)


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
    trainer, untrained = trained(training), trainer_of(training)
    first, last, before = trainer.state.history[0], trainer.state.history[-1], untrained.evaluate()
    assert [metrics["epoch"] for metrics in trainer.state.history] == [1, 2, 3, 4, 5, 6]
    assert last["train_sense"] < first["train_sense"]
    assert last["train_pooled"] < first["train_pooled"]
    assert last["held_out_pooled_cosine"] > before["held_out_pooled_cosine"]
    assert last["held_out_sense"] < before["held_out_sense"]
    assert last["held_out_frequent"] == before["held_out_frequent"]
    if kind != "static":  # --train-embeddings is off
        began, ended = (student.body.model.state_dict() for student in (untrained.student, trainer.student))
        unchanged = {name for name, tensor in began.items() if torch.equal(tensor, ended[name])}
        assert unchanged == {"embeddings.word_embeddings.weight"}


def test_sentence_vectors_pay_nothing_for_separate_senses(training: DistillationConfig) -> None:
    bodies = []
    for mix in (LossWeights(pooled=100), LossWeights(sense=10, pooled=100, replaced=100)):
        student = trained(replace(training, mix=mix, student=StudentSettings(kind="static", heads="separate"))).student
        bodies.append({name: value for name, value in student.body.state_dict().items() if "sense" not in name})
    alone, both = bodies
    assert set(alone) == {"means", "confidence", "shift.weight", *(f"mixer.{name}" for name in MIXER)}
    assert all(torch.equal(both[name], value) for name, value in alone.items())


def test_gradients_of_senses_are_clipped_and_checked_by_themselves(training: DistillationConfig) -> None:
    own = replace(
        training, student=StudentSettings(kind="static", heads="separate"), mix=LossWeights(sense=1, pooled=50)
    )
    engine = trainer_of(own).engine
    shared, senses = engine.clipped
    assert len(shared) > 2
    assert len(senses) == len(MIXER) + 2

    def step(gradient: float) -> None:
        for parameter in (*shared, *senses):
            parameter.grad = torch.full_like(parameter, gradient)
        engine.step(lr=0.0)

    norms: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.optimizer, "step", lambda: norms.extend(norm_of(part) for part in engine.clipped))
        step(1e3)
        step(1e-9)
    assert norms[:2] == pytest.approx([1.0, 1.0], rel=1e-4)
    assert max(norms[2:]) < 1e-3
    for part in engine.clipped:
        for parameter in (*shared, *senses):
            parameter.grad = torch.zeros_like(parameter)
        part[-1].grad.fill_(float("nan"))
        with pytest.raises(MsenseError, match="not finite"):
            engine.step(lr=0.0)


def norm_of(parameters: list[torch.Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([own.grad.norm() for own in parameters])))


@pytest.mark.parametrize(("kind", "stop"), [("static", 1), ("layers:1", 3)])
def test_a_resumed_training_gives_the_same_numbers(
    training: DistillationConfig, tmp_path: Path, kind: str, stop: int
) -> None:
    """Also in the middle of an epoch, with large weight decay, and with dropout."""
    training = replace(training, student=StudentSettings(kind=kind), weight_decay=1.0, checkpoint_steps=3, epochs=2)
    whole = trained(training).state.history
    trained(training, stop=stop).save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"state.json", "tensors.safetensors", "tensors.sha256"}
    stored = set(load_file(tmp_path / "tensors.safetensors"))
    assert "student.head.weight" in stored
    assert "student.body.model.embeddings.word_embeddings.weight" not in stored  # it is not trained
    torch.manual_seed(99)
    resumed = trained(training, tmp_path).state.history
    assert len(resumed) == len(whole) == 2
    for a, b in zip(whole, resumed, strict=True):
        assert a | {"tokens_per_s": 0} == pytest.approx(b | {"tokens_per_s": 0}, rel=1e-6)


@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_hidden_state_losses_approach_the_teacher(training: DistillationConfig, name: str) -> None:
    training = replace(training, student=StudentSettings(kind="layers:1", heads="one"), mix=LossWeights(**{name: 1}))
    history = trained(training).state.history
    assert history[-1][f"train_{name}"] < 0.8 * history[0][f"train_{name}"]
    teacher = replace(training, student=StudentSettings(kind="layers:2", heads="one"))  # all layers of the teacher
    assert trainer_of(teacher).evaluate()[f"held_out_{name}"] == pytest.approx(0, abs=1e-5)


def test_a_finished_training_is_kept(corpus: Corpus) -> None:
    with small_partitions():
        with pytest.raises(StoppedError):  # after the training, before the student is written
            corpus.distill("run", stopping("save student folder"), held_out=0.2, epochs=2, student="static")
        run = corpus.folder / "run"
        trained_at = (run / "metrics.jsonl").stat().st_mtime_ns
        stats = corpus.distill("run", held_out=0.2, epochs=2, student="static")["stages"]["training"]
        assert (run / "metrics.jsonl").stat().st_mtime_ns == trained_at
        written_at = (run / "student" / "model.safetensors").stat().st_mtime_ns
        again = corpus.distill("run", held_out=0.2, epochs=2, student="static")["stages"]["training"]
    assert again | {"seconds": 0} == stats | {"seconds": 0}
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == written_at
    assert not list((run / "training").glob("[0-9a-f]*"))  # checkpoints are removed
    assert "held out accuracy" in (run / "student" / "README.md").read_text()


def test_slices_of_a_batch_add_up_to_it(training: DistillationConfig) -> None:
    one, many = (trained(replace(training, accumulate=n), stop=1).state.history[0] for n in (1, 4))
    for name in ("train_sense", "train_pooled", "held_out_sense", "held_out_pooled"):
        assert many[name] == pytest.approx(one[name], rel=1e-4)


def foreign(tensors: Path) -> None:
    save_file({"student.body.other": torch.zeros(2)}, tensors)
    tensors.with_suffix(".sha256").write_text(storage.sha256_of(tensors))


def invalid_state(tensors: Path) -> None:
    tensors.with_name("state.json").write_text('{"epoch": "one"}')


def test_corrupted_checkpoints_are_refused(training: DistillationConfig, tmp_path: Path, outcome: Outcome) -> None:
    trained(training, stop=1).save(tmp_path / "checkpoint")
    trainer = trainer_of(training)
    for damage, spoil in {**DAMAGES, "foreign": foreign, "state": invalid_state}.items():
        shutil.copytree(tmp_path / "checkpoint", tmp_path / damage)
        spoil(tmp_path / damage / "tensors.safetensors")
        with pytest.raises(InputError, match=r"the checkpoint .* is corrupted .*delete .* to train from the beginning"):
            trainer.restore(tmp_path / damage)
        if damage in DAMAGES:
            outcome(damage, "training", "reported; retrained")


def test_losses_and_gradients_that_are_not_finite_end_the_training(training: DistillationConfig) -> None:
    broken, other = trainer_of(training), trainer_of(training)
    with torch.no_grad():
        broken.student.body.means.fill_(float("inf"))
    with pytest.raises(MsenseError, match=r"the loss is not finite .*smaller --lr"):
        next(broken.run())
    for parameter in other.student.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    with pytest.raises(MsenseError, match=r"a gradient is not finite: use a smaller --lr"):
        other.engine.step(1e-3)


@pytest.mark.parametrize("kind", ["static", "layers:1"])
def test_pruned_embedding_tables_learn_like_whole_ones(
    training: DistillationConfig, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training = replace(training, student=StudentSettings(kind=kind), epochs=1, train_embeddings=True)
    pruned = trained(training).student
    present = pruned.body.get_input_embeddings().tokens
    assert 0 < len(pruned.body.get_input_embeddings().weight) == len(present) < pruned.config.vocab_size
    restore_embeddings(pruned)
    began = build_student(training).body.get_input_embeddings().weight
    monkeypatch.setattr(distiller, "prune_embeddings", lambda *_: None)
    whole = trained(training).student
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    moved = (pruned.body.get_input_embeddings().weight != began).any(1)
    absent = torch.ones(len(moved), dtype=torch.bool)
    absent[present] = False
    assert moved[present].any()
    assert absent.any()
    assert not moved[absent].any()
    save_student(tmp_path, pruned)
    ids = torch.arange(pruned.config.vocab_size)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        loaded = load_student(tmp_path)(ids, mask).hidden
        torch.testing.assert_close(loaded, pruned.eval()(ids, mask).hidden, rtol=1e-4, atol=1e-6)


def test_an_invalid_student_is_refused_before_labelling(corpus: Corpus) -> None:
    with pytest.raises(InputError, match=r"'layers:99': the teacher has 2 layers"):
        corpus.distill("invalid", student="layers:99")
    assert not (corpus.folder / "invalid" / "labels").exists()


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


def test_distilling_on_ray_with_two_workers(ray: None, corpus: Corpus) -> None:
    given = {"local": False, "workers": 2, "epochs": 2, "batch_tokens": 256, "lr": 5e-3}
    stats = corpus.distill("ray", **given, held_out=0.2, student="static")["stages"]["training"]
    assert stats["epochs"] == 2
    assert stats["held_out"]["accuracy"] > stats["held_out"]["frequent"] / 2
    encoder = SenseEncoder.from_pretrained(corpus.folder / "ray" / "student")
    assert encoder.config.dim == SenseDictionary.load(corpus.folder / "dict").dim
    assert encoder.encode(["the bank of the river"]).shape == (1, encoder.config.dim)
    assert encoder.tokens("the bank of the river")[1].token == "bank"


def test_the_learning_rate_follows_the_steps_of_all_epochs(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    step = DDPEngine.step
    monkeypatch.setattr(DDPEngine, "step", lambda engine, lr: (taken.append(lr), step(engine, lr))[1])
    given = {"epochs": 2, "batch_tokens": 256, "lr": 1.0, "schedule": "linear", "warmup": 0.0, "clip": 1e-6}
    corpus.distill("rates", student="static", **given)
    assert len(taken) > 4
    assert taken == pytest.approx([lr_factor(number, len(taken), 0.0, "linear") for number in range(len(taken))])


# last: DeepSpeed keeps its process group, with which no other training in this process can start
@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Torch's process group of this process alone; DeepSpeed keeps a reference to it."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # as Ray Train sets it
        yield
    dist.destroy_process_group()


SLOW = [pytest.param(stage, "layers:1", marks=pytest.mark.slow) for stage in (2, 3)]


@pytest.mark.parametrize(("stage", "kind"), [(1, "static"), *SLOW])
def test_deepspeed_equals_adamw_and_resumes(
    training: DistillationConfig, process_group: None, tmp_path: Path, stage: int, kind: str
) -> None:
    plain = replace(training, accumulate=3, epochs=2, student=StudentSettings(kind=kind))
    training = replace(plain, deepspeed_stage=stage)
    whole, expected = (trained(settings).state.history[1] for settings in (training, plain))
    trained(training, stop=1).save(tmp_path)
    resumed = trained(training, tmp_path).state.history[1]
    for name in ("train_sense", "train_pooled", "held_out_sense", "held_out_accuracy"):
        assert resumed[name] == pytest.approx(whole[name], rel=1e-5)
        assert whole[name] == pytest.approx(expected[name], rel=1e-3)
    file = str(tmp_path / "state.json")
    state = storage.read_json(file)
    storage.write_json(file, {**state, "workers": 2})
    with pytest.raises(InputError, match=r"was written by 2 workers, .*: use --workers 2, or delete the checkpoint"):
        trainer_of(training).restore(tmp_path)
    storage.write_json(file, state)
    shutil.rmtree(tmp_path / "zero")
    with pytest.raises(InputError, match=r"the checkpoint .* is corrupted"):
        trainer_of(training).restore(tmp_path)
