"""The texts and teacher's vectors of labels, in the form in which other libraries train on them."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from msense.training.label_dataset import LabelSet

TEXTS, VECTORS = "texts.json", "texts.npy"  # tokenlearn's layout
BLOCK = 1024  # rows that are read at once


def export_texts(labels: LabelSet, tokenizer: Tokenizer, folder: Path) -> float:
    """Write the texts of all training rows, a list of str, and the teacher's vectors of them, float32 [n, D'], shuffled.

    Held-out rows are left out. Texts are decoded from the rows' tokens.

    Returns:
        The share of the texts that are tokenized into the row's tokens again.
    """
    rows = np.setdiff1d(np.arange(len(labels.lengths)), labels.held_out())
    np.random.default_rng(0).shuffle(rows)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts: list[str] = []
    vectors, same = [], 0
    for block in np.array_split(rows, -(-len(rows) // BLOCK)):
        batch = labels.read(block)
        assert batch.pooled is not None, "labels without sentence vectors"
        ids = [own[mask].tolist() for own, mask in zip(batch.ids, batch.mask, strict=True)]
        decoded = tokenizer.decode_batch(ids, skip_special_tokens=True)
        same += sum(found.ids == own for found, own in zip(tokenizer.encode_batch(decoded), ids, strict=True))
        texts += decoded
        vectors.append(batch.pooled.numpy())
    (folder / TEXTS).write_text(json.dumps(texts), encoding="utf-8")
    np.save(folder / VECTORS, np.concatenate(vectors))
    return same / len(rows)
