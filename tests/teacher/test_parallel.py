"""A teacher of several ranks, and one with its weights in host memory, give the vectors of a plain one or are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import BATCH, SIZES, TEACHER, split_vectors, write_body

from msense.errors import InputError, MsenseError
from msense.runtime.local_training import SpawnedPool
from msense.teacher import parallel
from msense.teacher.memory import teacher_size
from msense.teacher.model import Teacher
from msense.teacher.parallel import ALWAYS_LOADED, OffloadedTeacher, ParallelTeacher
from msense.teacher.splitting import check_split

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "bert": {},
}


def write_config(folder: Path, kind: str, **settings: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **SIZES, **settings}))
    return str(folder)


@pytest.mark.integration
def test_two_ranks_give_the_vectors_of_one(tmp_path: Path) -> None:
    """Also those of bidirectional decoders, of an inner layer, and of weights that are converted."""
    folders = {kind: write_body(tmp_path / kind, kind, **more) for kind, more in FAMILIES.items()}
    for kind in ("llama", "mistral"):
        folders[f"{kind} both ways"] = write_body(tmp_path / f"{kind}2", kind, **FAMILIES[kind], is_causal=False)
    teachers: list[dict[str, Any]] = [{"name": name} for name in folders.values()]
    teachers += [{"name": folders["llama"], "layer": 1}, {"name": folders["llama"], "dtype": "bfloat16"}]
    wrong = {
        "persimmon": {},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "phi3": {"pad_token_id": 0},
    }
    refused = [write_body(tmp_path / kind, kind, **more) for kind, more in wrong.items()]
    first, second = split_vectors([*teachers, *({"name": name} for name in refused)], str(tmp_path / "store"))
    mask = BATCH[1]
    for number, given in enumerate(teachers):
        vectors, again = first[2 * number : 2 * number + 2]
        expected = Teacher(**{**TEACHER, **given}).embed(*BATCH).float().numpy()
        limit = 1e-5 if "dtype" not in given else 0.1
        assert np.abs(vectors - expected)[mask].max() < limit * np.abs(expected)[mask].max(), given
        assert vectors.tobytes() == again.tobytes() == second[2 * number].tobytes(), given
    changes = [np.abs(first[2 * a] - first[2 * b])[mask].max() for a, b in ((0, 4), (1, 5))]  # causal and both ways
    assert min(changes) > 0.1
    for number, problem in enumerate(("its vectors change by", "every rank would hold 9.%", "DeepSpeed fails at this")):
        for rank in (first, second):
            message = str(rank[2 * (len(teachers) + number) + 1])
            assert f"{refused[number]!r} cannot be split over 2 ranks: {problem.partition('9')[0]}" in message
            assert "--offload" in message


@pytest.mark.integration
def test_weights_in_host_memory_change_nothing(tmp_path: Path) -> None:
    with SpawnedPool(1) as pool:  # not in this process, as other tests have process groups of their own
        for kind, dtype in (("llama", "float32"), ("bert", "bfloat16")):
            name = write_body(tmp_path / kind, kind, **FAMILIES[kind], hidden_size=64)
            vectors, offloaded = pool.submit(_run_offloaded, name, dtype).result()
            plain = Teacher(name, **{**TEACHER, "dtype": dtype}).embed(*BATCH).float().numpy()
            assert vectors == plain[BATCH[1]].tobytes()
            assert offloaded


def _run_offloaded(name: str, dtype: str) -> tuple[bytes, bool]:
    teacher = OffloadedTeacher(name, **{**TEACHER, "dtype": dtype})
    vectors = teacher.embed(*BATCH).float().numpy()[BATCH[1]].tobytes()
    matrices = [p for p in teacher.engine.module.parameters() if p.ds_shape.numel() > ALWAYS_LOADED]
    return vectors, len(matrices) >= 6 and all(p.numel() == 0 for p in matrices)  # nothing is left on the device


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ('echo \'{"error": "no room", "input": false}\'; exit 1', "rank 1 of the teacher failed: no room"),
        ('echo \'{"error": "give another", "input": true}\'; exit 1', "^give another$"),
        ("echo broken >&2; exit 3", "rank 1 of the teacher ended with 3, after:\nbroken"),
    ],
)
def test_the_error_of_a_rank_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\n{script}\n")
    executable.chmod(0o755)
    monkeypatch.setattr(parallel.sys, "executable", str(executable))
    with pytest.raises(MsenseError, match=problem) as caught:
        ParallelTeacher(write_body(tmp_path / "bert", "bert"), ranks=2, **TEACHER)
    assert isinstance(caught.value, InputError) == ("another" in problem)


def test_what_cannot_be_split_is_refused_by_its_config(tmp_path: Path) -> None:
    """There is nothing but config.json to read."""
    llama = write_config(tmp_path / "llama", "llama")
    check_split(llama, None, 2)
    with pytest.raises(
        InputError, match=r"over 3 ranks: its heads \(.*_heads 4 and .*_heads 2\) .* possible are 1, 2;"
    ):
        check_split(llama, None, 3)
    with pytest.raises(InputError, match="over 4 ranks: its heads"):
        check_split(llama, None, 4)
    with pytest.raises(InputError, match=r"_heads 1\) give no equal shares; possible are 1;"):
        check_split(write_config(tmp_path / "one", "gemma", num_key_value_heads=1), None, 2)
    reasons = {
        "phi3": "several projections in one matrix",
        "mixtral": "experts of a mixtral model",
        "fnet": "not among",
    }
    for kind, reason in reasons.items():
        name = write_config(tmp_path / kind, kind)
        check_split(name, None, 1)
        with pytest.raises(InputError, match=f"'{name}' cannot be split over 2 ranks: .*{reason}.*--offload"):
            check_split(name, None, 2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_sizes_are_those_of_the_model(tmp_path: Path, kind: str) -> None:
    name = write_body(tmp_path / kind, kind, **FAMILIES[kind])
    size, model = teacher_size(name, None), Teacher(name, **TEACHER).engine.module
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    tables = 40 * 32 + (66 * 32 if kind == "bert" else 0)  # positions and types
    assert (size.embeddings, size.dim, size.inner, size.layers) == (tables, 32, 256, 3)


def test_memory_of_a_rank(tmp_path: Path) -> None:
    """Against the weights of Llama 3, in GB of bfloat16: the embedding table is on every rank, the rest is shared."""
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    size = teacher_size(write_config(tmp_path / "8b", "llama", **sizes), None)
    assert [round(size.rank_bytes("bfloat16", 0, ranks=n) / 1e9, 1) for n in (1, 2, 4, 8)] == [15.0, 8.0, 4.5, 2.8]
    batch = size.rank_bytes("bfloat16", 16384) - size.rank_bytes("bfloat16", 0)
    assert batch == 16384 * 2 * (6 * 4096 + 3 * 14336)
    every = size.rank_bytes("bfloat16", 16384, keeps_layers=True) - size.rank_bytes("bfloat16", 16384)
    assert every == 16384 * 2 * 32 * 4096
    assert size.rank_bytes("bfloat16", 0, offload=True) < size.rank_bytes("bfloat16", 0) / 4
    assert size.rank_bytes("float32", 0) == 2 * size.rank_bytes("bfloat16", 0)
