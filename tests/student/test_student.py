"""Student models: padding invariance, initialization from a teacher, fast inference, and validated folders."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import write_family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from students import dictionary_of, learnt
from tiny import make
from transformers import BertConfig, BertModel

from msense.config.build import BuildConfig
from msense.errors import InputError, StudentError
from msense.student import StaticEncoder, Student, init_student, load_student, save_student
from msense.student.config import StaticSizes, StudentConfig, StudentSettings
from msense.student.layout import StudentFiles
from msense.student.static import confidence, token_means
from msense.teacher.batching import pad_batch
from msense.teacher.body import truncate_layers
from msense.teacher.model import Teacher
from msense.teacher.pooling import pool
from msense.teacher.spec import load_teacher_info

MakeTeacher = Callable[..., Path]
TINY = {"units": 6, "kernel_size": 3}
POOLINGS = st.sampled_from(["mean", "cls", "lasttoken"])
IDS = torch.tensor([[2, 7, 5, 3], [2, 9, 3, 0]])
MASK = torch.arange(4) < torch.tensor([[4], [3]])


def static_student(pooling: str = "mean", heads: str = "two", seed: int = 0, **config: object) -> Student:
    given = {"kind": "static", "teacher": {"name": "t"}, "tokenizer_fingerprint": "", "dim": 4, "vocab_size": 9}
    sizes = StaticSizes(units=6, kernel_size=5)
    student = learnt(Student(StudentConfig(**given, pooling=pooling, heads=heads, static=sizes, **config)), seed)
    generator = torch.Generator().manual_seed(seed)
    student.body.means.copy_(torch.randn(9, 4, generator=generator))
    student.body.confidence.copy_(torch.rand(9, generator=generator))
    return student


def padded(rows: list[list[int]], side: str = "right", pad: int = 0, more: int = 0) -> tuple[torch.Tensor, ...]:
    ids, mask = pad_batch([np.array(row) for row in [*rows, [0] * (max(map(len, rows)) + more)]], pad, side)
    return torch.from_numpy(ids[:-1]).long(), torch.from_numpy(mask[:-1])


def run(student: Student, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        hidden, senses = student(ids, mask)
        return student.sentence(hidden, mask), hidden[mask], senses[mask]


def check_padding(student: Student, rows: list[list[int]], pads: tuple[int, ...], more: int) -> None:
    """Outputs of a padded batch equal those of its passages alone."""
    expected = [torch.cat(outputs) for outputs in zip(*(run(student, *padded([row])) for row in rows), strict=True)]
    for side in ("right", "left"):
        for pad in pads:
            for a, b in zip(run(student, *padded(rows, side, pad, more)), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


texts = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=12), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=texts, pooling=POOLINGS, more=st.integers(0, 3), pad=st.integers(0, 8))
def test_static_student_ignores_padding(rows: list[list[int]], pooling: str, more: int, pad: int) -> None:
    check_padding(static_student(pooling, normalize=True), rows, (pad,), more)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_students_train_without_dropout(make_teacher: MakeTeacher, kind: str) -> None:
    folder = make_teacher(kind)
    student = init_student(StudentSettings(kind="layers:2"), dictionary_of(folder), str(folder)).train()
    first, second = (student(IDS, MASK).hidden[MASK] for _ in range(2))
    assert student.training
    assert torch.equal(first, second)
    student.body.train()
    assert not torch.equal(first, student(IDS, MASK).hidden[MASK])


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "llama"])
def test_layers_equal_the_teachers_and_load_unchanged(make_teacher: MakeTeacher, kind: str, tmp_path: Path) -> None:
    folder = make_teacher(kind)
    dictionary = dictionary_of(folder)

    def teacher(layer: int) -> torch.Tensor:
        model = Teacher(str(folder), revision=None, layer=layer, dtype="float32", device="cpu")
        return model.embed(IDS.numpy(), MASK.numpy())[MASK].clone()

    two, one, listed = (
        init_student(StudentSettings(kind=f"layers:{n}", heads=heads), dictionary, str(folder)).eval()
        for n, heads in (("2", "two"), ("1", "one"), ("0,1", "two"))
    )
    _, hidden, senses = run(two, IDS, MASK)
    torch.testing.assert_close(hidden, teacher(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(senses, hidden)  # the head is initialized to identity
    torch.testing.assert_close(run(listed, IDS, MASK)[1], hidden)
    if kind in ("bert", "roberta"):  # the others normalize after their last layer
        torch.testing.assert_close(run(one, IDS, MASK)[1], teacher(1), rtol=1e-4, atol=1e-5)
    if kind != "llama":
        check_padding(one, [[2, 7, 5, 3], [2, 9, 3], [2, 6, 8, 10, 11, 3]], (0,) if kind == "roberta" else (0, 9), 2)
    for _ in range(2):  # the second replaces the first
        save_student(tmp_path / "s", one)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]
    again = load_student(tmp_path / "s")
    assert again.config == one.config
    assert all(torch.equal(a, b) for a, b in zip(run(again, IDS, MASK), run(one, IDS, MASK), strict=True))
    two(IDS, MASK).senses[MASK].square().sum().backward()
    assert all(p.grad is not None for p in two.parameters())  # required by data-parallel training


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"kind": f"layers:{n}"}, "the teacher has 2 layers, 0 to 1: .* n from 1 to 2") for n in ("0", "3", "0,2", "1,0")]
    + [({"kind": f"layers:{n}"}, "invalid student .*: write layers:2") for n in ("", "two", "-1", "1.5")]
    + [
        ({"kind": "static", "kernel_size": 4}, "must be odd"),
        ({"kind": "static", "units": 0}, "units: Input should be greater than 0"),
        ({"heads": "three"}, "heads: Input should be"),
        *(
            ({"kind": "static", "prior_count": n}, "prior_count is .* finite and not neg")
            for n in (-5.0, np.nan, np.inf)
        ),
    ],
)
def test_invalid_settings_are_refused(teacher: Path, wrong: dict, match: str) -> None:
    with pytest.raises(StudentError, match=match):
        init_student(StudentSettings(**wrong), dictionary_of(teacher), str(teacher))


def test_shared_layers_cannot_be_selected() -> None:
    from transformers import AlbertConfig, AlbertModel

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(StudentError, match="albert model has no list of its 3 layers"):
        truncate_layers(AlbertModel(AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=9)), "layers:2")


def test_another_encoder_has_the_same_tokenizer_and_an_adaptor(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder, other, foreign = make_teacher("bert"), make_teacher("bert"), make_teacher("llama")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vocab = load_teacher_info(str(folder), BuildConfig())[0].vocab_size
    BertModel(BertConfig(vocab_size=vocab, max_position_embeddings=64, **sizes)).save_pretrained(other)
    dictionary = dictionary_of(folder)
    student = init_student(StudentSettings(kind=str(other)), dictionary, str(folder))
    assert student(IDS, MASK).senses.shape == (2, 4, dictionary.dim)
    assert (student.body.width, student.adaptor.out_features) == (8, 16)
    save_student(tmp_path, student)
    torch.testing.assert_close(run(load_student(tmp_path), IDS, MASK), run(student.eval(), IDS, MASK))
    with pytest.raises(StudentError, match=r"has another tokenizer .*give an encoder with the same tokenizer"):
        init_student(StudentSettings(kind=str(foreign)), dictionary, str(folder))
    with pytest.raises(StudentError, match=r"cannot load student 'no-such/model'"):
        init_student(StudentSettings(kind="no-such/model"), dictionary, str(folder))


def test_a_teacher_that_does_not_match_the_dictionary_is_refused(make_teacher: MakeTeacher) -> None:
    folder = make_teacher("bert")
    wrong = {
        "tokenizer": dictionary_of(folder, tokenizer_fingerprint="abc"),
        "teacher": dictionary_of(folder, teacher={"name": "t", "fingerprint": "abc"}),
        "dimension": make([1] * 25, dim=3, tokenizer_fingerprint="", teacher={"name": "t"}),
        "vocabulary size": make([1, 2], dim=16, tokenizer_fingerprint="", teacher={"name": "t"}),
    }
    for name, dictionary in wrong.items():
        with pytest.raises(StudentError, match=f"does not match the student and teacher .*: it has {name} .*, not "):
            init_student(StudentSettings(kind="static"), dictionary, str(folder))
    maximum = make_teacher("bert", pooling="max_tokens")
    with pytest.raises(StudentError, match="pooling: Input should be 'mean'"):
        init_student(StudentSettings(kind="static"), dictionary_of(maximum), str(maximum))


def test_pooling_known_by_hand() -> None:
    hidden = torch.tensor([[[9.0, 9], [3, 0], [1, 4]], [[3, 0], [1, 4], [5, 5]]])
    mask = torch.tensor([[False, True, True], [True, True, False]])
    hidden[~mask] = torch.nan
    for how, normalize, expected in (
        ("mean", False, [2, 2]), ("cls", False, [3, 0]), ("lasttoken", False, [1, 4]), ("cls", True, [1, 0])
    ):  # fmt: skip
        assert pool(hidden, mask, how, normalize=normalize).tolist() == [expected] * 2


def test_token_means_known_by_hand() -> None:
    d = make([2, 0, 1, 0, 1], dim=2, dtype="float32")
    d.counts[:] = [1, 3, 5, 1000]
    d.centroids[:] = torch.tensor([[0.0, 4], [4, 0], [1, 1], [5, 1]])
    inputs = torch.tensor([[3.0], [2], [1], [2], [5]])  # the means are about (the input, 1)
    means = token_means(d, inputs)
    assert means[[0, 2, 4]].tolist() == [[3, 1], [1, 1], [5, 1]]
    assert means[1].tolist() == means[3].tolist()  # same input
    assert means[1].tolist() == pytest.approx([2, 1], abs=0.4)  # the mean of all is about (3.3, 1)
    assert token_means(make([0, 0], dim=2), torch.zeros(2, 1)).tolist() == [[0, 0], [0, 0]]


def test_confidence_known_by_hand() -> None:
    assert confidence(make([0, 1, 1]), np.array([0, 5, 15]), 5.0).tolist() == [0, 0.5, 0.75]
    assert confidence(make([0, 1, 1], excluded_token_ids=(0,)), np.array([0, 5, 0]), 0.0).tolist() == [1, 1, 0]


def test_static_student_starts_at_token_means_and_unseen_tokens_stay(teacher: Path) -> None:
    d = dictionary_of(teacher, excluded_token_ids=())
    seen = np.arange(d.vocab_size) % 3  # tokens 0, 3, 6, ... never
    student, again = (
        init_student(StudentSettings(kind="static", **TINY), d, str(teacher), seen=seen) for _ in range(2)
    )
    assert torch.equal(student.body.mixer.taps, again.body.mixer.taps)  # seeded
    means = student.body.means[IDS[MASK]].clone()
    hidden, senses = student(IDS, MASK)
    assert torch.equal(hidden[MASK], means)
    assert torch.equal(senses[MASK], means)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    hidden[MASK].square().sum().backward()
    optimizer.step()
    stayed = (run(student, IDS, MASK)[1] == means).all(1)
    assert stayed.tolist() == (IDS[MASK] % 3 == 0).tolist()


def test_separate_heads_do_not_share_what_they_learn(teacher: Path) -> None:
    dictionary = dictionary_of(teacher)
    student = init_student(StudentSettings(kind="static", heads="separate", **TINY), dictionary, str(teacher))
    learnt(student)
    trained = {}
    for name, part in zip(("sentence", "senses"), student(IDS, MASK), strict=True):
        student.zero_grad(set_to_none=True)
        part[MASK].square().sum().backward(retain_graph=True)
        trained[name] = {key for key, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    mixer = {"project.weight", "taps", "passage.weight", "passage.bias", "back.weight", "back.bias"}
    assert trained["sentence"] == {"body.shift.weight", *(f"body.mixer.{name}" for name in mixer)}
    assert trained["senses"] == {"head.weight", "head.bias", *(f"body.sense_mixer.{name}" for name in mixer)}


def test_a_table_is_the_mean_of_its_tokens_without_special_ones(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    folder = make_teacher("bert", pooling="cls")
    dictionary = dictionary_of(folder)
    student = init_student(StudentSettings(kind="table"), dictionary, str(folder))
    assert (student.config.pooling, student.config.heads) == ("mean", "one")
    hidden = run(student, IDS, MASK)[1]
    first, last = (IDS[0, [0, -1]]).tolist()  # [CLS] and [SEP]
    assert not student.body.table()[[first, last]].any()
    static = init_student(StudentSettings(kind="static", **TINY), dictionary, str(folder))
    assert torch.equal(hidden[1:3], static.body.means[IDS[0, 1:3]])
    save_student(tmp_path / "s", student)
    again = load_student(tmp_path / "s")
    assert again.config == student.config
    mean = student.body.table().detach()[[7, 5, 5]].mean(0)
    np.testing.assert_allclose(StaticEncoder(again).sentences([np.array([7, 5, 5])])[0], mean.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="heads 'two' do not exist for 'table'"):
        StudentConfig.model_validate({**student.config.model_dump(), "heads": "two"})


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 8), max_size=12), max_size=6),
    pooling=POOLINGS,
    normalize=st.booleans(),
    heads=st.sampled_from(["separate", "two", "one"]),
    chunk=st.sampled_from([1, 7, 4096]),
    seed=st.integers(0, 3),
)
def test_fast_inference_equals_the_module(
    rows: list[list[int]], pooling: str, normalize: bool, heads: str, chunk: int, seed: int
) -> None:
    student = static_student(pooling, heads, seed, normalize=normalize)
    encoder = StaticEncoder(student)
    ids, mask = padded([*rows, [1]])  # never an empty batch
    sentences, *embeddings = (output.numpy()[:-1] for output in run(student, ids, mask))
    arrays = [np.array(row, np.int32) for row in rows]
    kept = [i for i, row in enumerate(rows) if row or pooling == "mean"]  # an empty text has no first token
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msense.student.static_inference.CHUNK_TOKENS", chunk)
        np.testing.assert_allclose(encoder.sentences(arrays)[kept], sentences[kept], atol=1e-5)
        for actual, expected in zip(
            (encoder.hidden(arrays), encoder.sense_embeddings(arrays)), embeddings, strict=True
        ):
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_fast_inference_is_for_static_students_and_their_tokens(teacher: Path) -> None:
    with pytest.raises(InputError, match="token ids from 1 to 9 exceed the student's vocabulary, 0 to 8"):
        StaticEncoder(static_student()).sentences([np.array([1, 9])])
    layers = init_student(StudentSettings(kind="layers:1"), dictionary_of(teacher), str(teacher))
    with pytest.raises(StudentError, match="'layers:1' is a transformer: give a static student"):
        StaticEncoder(layers)


@pytest.fixture
def saved(teacher: Path, tmp_path: Path) -> StudentFiles:
    save_student(tmp_path / "s", init_student(StudentSettings(kind="layers:1"), dictionary_of(teacher), str(teacher)))
    return StudentFiles(tmp_path / "s")


STATIC = {"static": {"units": 4, "kernel_size": 3}}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"max_length": 1 << 40}, "max_length: Input should be less"),
        ({"prompt": "x" * 70_000}, "prompt: .* at most 65536"),
        ({"dim": 17}, "does not match config.json"),
        ({"pooling": "max"}, "pooling: Input should be"),
        ({"heads": "one"}, r"head.bias has shape \(16,\) and dtype F32, expected None"),
        ({"body": None}, "heads 'two' do not exist"),
        (STATIC, "only one of body and static"),
        ({"static": {"units": 4, "window": 2}, "body": None}, "must be odd"),
        ({**STATIC, "body": None, "vocab_size": 1 << 21}, "does not match config.json"),
        ({"body": {}}, "unknown model type 'None'"),
        ({"body": {"model_type": "../evil", "auto_map": {"AutoModel": "evil.Evil"}}}, "unknown model type '../evil'"),
        ({"body.num_hidden_layers": 2}, "does not match config.json"),
        ({"body.num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"body.hidden_size": 1 << 15, "body.intermediate_size": 1 << 20}, "does not match config.json"),
        ({"body.hidden_size": -4}, "is not a valid student"),
        ({"body.num_attention_heads": 7}, "is not a valid student"),
    ],
)
def test_hostile_configs_are_refused(saved: StudentFiles, changes: dict, match: str) -> None:
    config = json.loads(saved.config.read_text())
    for name, value in changes.items():
        parent, _, key = name.rpartition(".")
        (config[parent] if parent else config)[key] = value
    saved.config.write_text(json.dumps(config))
    with pytest.raises(StudentError, match=match):
        load_student(saved.folder)


def test_hostile_weights_are_refused(saved: StudentFiles, tmp_path: Path) -> None:
    tensors = load_file(saved.weights)
    whole = saved.weights.read_bytes()
    (tmp_path / "elsewhere").write_bytes(whole)
    head = tensors["head.weight"]
    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda path: None, "model.safetensors is missing"),
        (lambda path: path.write_bytes(whole[:-9]), "is truncated"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a pickle"), "truncated or not a safetensors file"),
        (os.mkfifo, "model.safetensors"),
        (lambda path: path.symlink_to(tmp_path / "elsewhere"), "outside the student"),
        (lambda path: save_file({**tensors, "head.weight": head.int()}, path), "head.weight has shape .* dtype I32"),
        (lambda path: save_file({**tensors, "head.weight": head / 0}, path), "head.weight has values that are NaN"),
        (lambda path: save_file({**tensors, "more": torch.zeros(2)}, path), r"more has shape \(2,\) .*expected None"),
    ]
    for spoil, match in cases:
        saved.weights.unlink(missing_ok=True)
        spoil(saved.weights)
        with pytest.raises(StudentError, match=match):
            load_student(saved.folder)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("skip", [0, 1, 2, 5])
def test_fast_inference_skips_tokens_of_a_prompt_as_the_module_does(pooling: str, skip: int) -> None:
    student = static_student(pooling)
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 1, 1, 1, 2, 3], [3] * 9]
    ids, mask = padded(rows)
    with torch.no_grad():
        expected = student.sentence(student(ids, mask).hidden, mask, skip).numpy()
    actual = StaticEncoder(student).sentences([np.array(row) for row in rows], skip)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


PEAK = """
import sys
from pathlib import Path
from students import dictionary_of
from msense.runtime.executor import peak_memory
from msense.student import StudentSettings, init_student
init_student(StudentSettings(kind="layers:2"), dictionary_of(Path(sys.argv[1]), max_length=32), sys.argv[1])
print(peak_memory())
"""


@pytest.mark.integration
def test_a_student_of_a_few_layers_needs_no_memory_for_the_others(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "vocab_size": 64}
    peaks = []
    for layers in (2, 40):
        folder = write_family(tmp_path / str(layers), "bert")
        config = BertConfig(num_hidden_layers=layers, **sizes)
        BertModel(config).to(torch.bfloat16).save_pretrained(folder)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [sys.executable, "-c", PEAK, str(folder)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    layer = 12 * sizes["hidden_size"] ** 2  # numbers
    assert peaks[1] - peaks[0] < 38 * layer  # half of what the other layers have in the file, a quarter in float32
