"""Every model type that is split over several ranks: a tiny model of it gives the same vectors on two ranks as on one."""

from pathlib import Path

import architectures
import numpy as np
import pytest
from ranks import BATCH, TEACHER, split_vectors

from msense.teacher.model import Teacher
from msense.teacher.splitting import SPLIT_TYPES

INNER = (
    "intermediate_size",
    "d_ff",
    "dim_ff",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_dim",
    "n_inner",
)


@pytest.mark.slow
def test_the_listed_model_types_are_split_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in INNER:  # DeepSpeed cuts inner states in pieces of 64
        monkeypatch.setitem(architectures.SIZES, name, 256)
    kinds = sorted(SPLIT_TYPES)
    folders = [str(architectures.write_family(tmp_path / kind, kind)) for kind in kinds]
    first, second = split_vectors([{"name": folder} for folder in folders], str(tmp_path / "store"))
    wrong = {}
    for number, (kind, folder) in enumerate(zip(kinds, folders, strict=True)):
        vectors, again = first[2 * number : 2 * number + 2]
        if isinstance(vectors, str):
            wrong[kind] = again
            continue
        expected = Teacher(folder, **TEACHER).embed(*BATCH).numpy()[BATCH[1]]
        if not np.abs(vectors[BATCH[1]] - expected).max() < 1e-4 * np.abs(expected).max():
            wrong[kind] = np.abs(vectors[BATCH[1]] - expected).max()
        if not vectors.tobytes() == again.tobytes() == second[2 * number].tobytes():
            wrong[kind] = "not the same bytes"
    assert not wrong
