"""Small students with random weights, and their saved folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tiny import WORDS, exemplars, make
from tokenizers import Tokenizer

from msense.config.build import BuildConfig
from msense.dictionary import DictionaryFiles, SenseDictionary
from msense.dictionary.format import write_tokenizer
from msense.student import Student, StudentSettings, init_student, save_pretrained
from msense.student.tokenizer import pad_ids
from msense.teacher.spec import load_teacher_info

TEXTS = ["the river bank", "", "a cat sat on the mat , running", "money", "zzz of deep", "is near " * 3, "dogs !"]
LONG = " ".join(WORDS * 200)
KINDS = ["static", "layers:1"]
SMALL = {"units": 6, "kernel_size": 5}


def dictionary_of(folder: Path, seed: int = 0, **config: object) -> SenseDictionary:
    info, _ = load_teacher_info(str(folder), BuildConfig())
    sizes = np.random.default_rng(seed).integers(0, 4, info.vocab_size).tolist()
    given = {
        "tokenizer_fingerprint": info.tokenizer_fingerprint,
        "teacher": {"name": "t", "fingerprint": info.fingerprint},
    }
    return make(sizes, dim=info.dim, dtype="float32", **given | config)


def learnt(student: Student, seed: int = 0) -> Student:
    """Change all weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return student.eval()


def shipped(
    teacher: Path, folder: Path, kind: str = "static", senses: str = "float32", prompt: str = "", **options: object
) -> tuple[Student, SenseDictionary]:
    """Save a student with changed weights and its dictionary in a folder; return both."""
    dictionary = dictionary_of(teacher, temperature_unit=20.0, max_length=24, prompt=prompt)
    built = folder.parent / f"{folder.name}-dictionary"
    dictionary.save(built)
    write_tokenizer(built, load_teacher_info(str(teacher), BuildConfig())[1].to_str())
    sizes = np.diff(dictionary.offsets)
    rows = [(token, s, r) for token, size in enumerate(sizes) for s in range(size) for r in (0, 1)]
    pq.write_table(exemplars(rows), DictionaryFiles(built).exemplars)
    dictionary = SenseDictionary.load(built)
    settings = StudentSettings(kind=kind, pooling="teacher", **SMALL)
    student = learnt(init_student(settings, dictionary, str(teacher)))
    save_pretrained(folder, student, dictionary, senses=senses, **options)
    return student, dictionary


def write_old(folder: Path, student: Student, dictionary: SenseDictionary) -> None:
    """Write a student as msense did before tables and transformers had the layout of sentence-transformers."""
    dictionary.save(folder / "dictionary")
    shutil.copyfile(dictionary.tokenizer_file, folder / "tokenizer.json")
    save_file(
        {name: tensor.detach().clone() for name, tensor in student.weights().items()}, folder / "model.safetensors"
    )
    config = student.config
    settings = {"prompts": {"default": config.prompt} if config.prompt else {}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings | {"default_prompt_name": None}))
    modules = [{"idx": 0, "name": "0", "path": "", "type": "msense.student.sentence_transformer.SenseModule"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config.json").write_text(config.model_dump_json(by_alias=True))


def ids_of(folder: Path, text: str) -> np.ndarray:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(24)
    return np.array(tokenizer.encode(text).ids)


@torch.no_grad()
def one(
    student: Student, ids: np.ndarray, dictionary: SenseDictionary | None = None, t: float | None = None
) -> np.ndarray:
    """Embed one text with the module itself; with a dictionary, replaced by its senses."""
    rows, mask = pad_ids([ids])
    hidden, senses = student(rows, mask)
    if dictionary is not None:
        hidden = dictionary.replace(rows[0], senses[0], t)[None]
    return student.sentence(hidden, mask)[0].numpy()


def outside(path: Path) -> None:
    """Replace a file by a link to its content outside the folder."""
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")
