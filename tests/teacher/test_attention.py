"""Attention of decoders: as the config or `--attention` says, proven by a probe, kept by dictionaries and students."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import write_family
from students import dictionary_of
from teachers import write_teacher
from tiny import make
from transformers import AutoModel

from msense.config.build import BuildConfig
from msense.errors import InputError
from msense.evaluation.cache_keys import model_key
from msense.evaluation.models import TeacherModel
from msense.evaluation.spec import Spec
from msense.student import StudentSettings, init_student, load_student, save_student
from msense.teacher.batching import pad_batch
from msense.teacher.model import Teacher
from msense.teacher.spec import Attention, TeacherOptions, load_teacher_info

QUICK = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "mixtral")
SLOW = (
    "qwen2",
    "gemma",
    "olmo2",
    "gpt_neox",
    "falcon",
    "opt",
    "bloom",
    "mpt",
    "gptj",
    "qwen3_moe",
    "gpt_oss",
    "cohere",
    "gemma4_text",
)
SLOW += ("starcoder2", "smollm3")
FAMILIES = [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
REFUSED = {("mpt", "bidirectional")}
TEXT = np.array([2, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 3])
CHANGED = np.r_[TEXT[:-2], 30, 3]


def load(folder: Path, attention: Attention) -> Teacher:
    return Teacher(str(folder), revision=None, layer=-1, dtype="float32", device="cpu", attention=attention)


def moved(first: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far the first tokens differ, in parts of their length."""
    return float((first - other)[:8].norm() / first[:8].norm())


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_late_tokens_move_early_ones_or_do_not(tmp_path: Path, kind: str, attention: Attention) -> None:
    folder = write_family(tmp_path / "teacher", kind)
    if (kind, attention) in REFUSED:
        with pytest.raises(InputError, match=f"attention should be {attention}|cannot read text alone"):
            load(folder, attention)
        return
    teacher = load(folder, attention)
    alone = teacher.embed(*pad_batch([TEXT]))[0]
    for side in ("right", "left"):
        rows = slice(0, len(TEXT)) if side == "right" else slice(-len(TEXT), None)
        batch = teacher.embed(*pad_batch([CHANGED, TEXT, np.tile(TEXT, 3)], side=side))
        torch.testing.assert_close(batch[1, rows], alone, atol=1e-4, rtol=1e-4)
        change = moved(alone, batch[0, rows])
        assert change > 1e-3 if attention == "bidirectional" else change < 1e-5

    dictionary = dictionary_of(folder, max_length=80)
    dictionary.config = dictionary.config.model_copy(update={"attention": attention})
    save_student(tmp_path / "s", init_student(StudentSettings(kind="layers:2"), dictionary, str(folder)))
    student = load_student(tmp_path / "s")
    with torch.no_grad():
        first, other = (student.body(*map(torch.from_numpy, pad_batch([row])))[0] for row in (TEXT, CHANGED))
    assert (moved(first, other) > 1e-3) == (attention == "bidirectional")


def test_a_config_that_says_bidirectional_is_read_so(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    teacher, other = load(folder, "auto"), load(folder, "causal")
    assert moved(*(teacher.embed(*pad_batch([row]))[0] for row in (TEXT, CHANGED))) > 1e-3
    assert moved(*(other.embed(*pad_batch([row]))[0] for row in (TEXT, CHANGED))) < 1e-6


def test_a_model_without_the_attention_of_its_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="is no decoder: a bert model sees the tokens after each token by design"):
        load_teacher_info(str(write_teacher(tmp_path / "bert")), TeacherOptions(attention="causal"))
    folder = write_family(tmp_path / "llama", "llama")
    model = AutoModel.from_pretrained(folder)
    real = type(model.layers[0].self_attn).forward

    def causal(self: torch.nn.Module, hidden_states: torch.Tensor, **given: object) -> object:
        length = hidden_states.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(len(hidden_states), 1, -1, -1)
        return real(self, hidden_states, **given | {"attention_mask": mask})

    monkeypatch.setattr(
        type(model.layers[0].self_attn), "forward", causal
    )  # as a version of transformers that ignores the setting
    with pytest.raises(InputError, match=r"should be bidirectional, but its tokens ignore those after them"):
        load(folder, "bidirectional")


def test_code_of_its_own_needs_a_word_about_attention(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="give --attention causal"):
        load_teacher_info(str(folder), TeacherOptions())
    info, _ = load_teacher_info(str(folder), BuildConfig(attention="bidirectional"))
    assert (info.attention, info.decoder) == ("bidirectional", True)


def test_evaluation_reads_a_teacher_with_the_attention_of_its_dictionary_or_as_it_is_given(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "teacher", "llama")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    fingerprint = load_teacher_info(str(folder), TeacherOptions(attention="causal"))[0].fingerprint
    rows = {}
    for attention in ("causal", "bidirectional"):
        spec = Spec("teacher", "teacher", teacher=str(folder), attention=attention, dtype="float32")
        rows[attention] = TeacherModel(spec, "cpu", threads=1).encode(["w4 w5 w6"])
    assert np.abs(rows["causal"] - rows["bidirectional"]).max() > 1e-3
    keys = {model_key(Spec("t", "teacher", teacher=str(folder), attention=name)) for name in rows}
    assert len(keys) == 2
    given = {"tokenizer_fingerprint": "", "teacher": {"name": "t", "fingerprint": fingerprint}, "vocab_size": 64}
    make([0] * 64, dim=32, **given, attention="bidirectional").save(tmp_path / "d")
    spec = Spec("r", "replaced", source=str(tmp_path / "d"), teacher=str(folder), dtype="float32", replace="hard")
    assert TeacherModel(spec, "cpu", threads=1).info.attention == "bidirectional"
    assert model_key(spec)
