"""Train or export a model of another library: `python train_rival.py KIND SETTINGS.json`, in a process of its own.

Imports only the standard library and what the kind needs, as it may run in another Python. `SETTINGS.json` holds the keyword
arguments of the kind's function; all write a folder that sentence-transformers loads.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARMUP = 0.1  # share of the steps, as in sentence-transformers' examples of distillation


def train_sentence_transformer(
    texts: str, output: str, start: dict[str, str], training: dict[str, Any], scratch: str
) -> None:
    """Train a model on the teacher's vectors of texts with the library's own trainer and its loss for distillation.

    Args:
        texts: folder with `texts.json`, a list of str, and `texts.npy`, float32 [n, D].
        output: folder of the model.
        start: `tokenizer`, the file of a random table's; or `table`, the folder of a static model; or `layers`, that of a
            teacher of which two layers are kept.
        training: learning_rate, num_train_epochs, per_device_train_batch_size, seed and threads.
        scratch: folder of the trainer.
    """
    import numpy as np
    import pyarrow as pa
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

    torch.set_num_threads(training["threads"])
    torch.manual_seed(training["seed"])
    vectors = np.load(Path(texts, "texts.npy"), allow_pickle=False)
    sentences = json.loads(Path(texts, "texts.json").read_text(encoding="utf-8"))
    labels = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    model = SentenceTransformer(modules=_modules(start, vectors.shape[1]), device="cpu")
    given = {name: value for name, value in training.items() if name != "threads"}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=scratch,
            warmup_steps=WARMUP,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **given,
        ),
        train_dataset=Dataset(pa.table({"sentence": sentences, "label": labels})),
        loss=EmbedDistillLoss(model),  # cosine, its default
    )
    began = time.perf_counter()
    done = trainer.train()
    record = {"seconds": time.perf_counter() - began, "steps": done.global_step, "loss": done.training_loss}
    model.save_pretrained(output, create_model_card=False)
    Path(output, "training.json").write_text(json.dumps({**record, **training, "texts": len(sentences)}))


def _modules(start: dict[str, str], dim: int) -> list[Any]:
    """Return the modules of an untrained model: see `train_sentence_transformer`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    if "layers" in start:
        teacher = SentenceTransformer(start["layers"], device="cpu", trust_remote_code=False)
        body = teacher.transformers_model
        body.encoder.layer = body.encoder.layer[:2]
        body.config.num_hidden_layers = 2
        return list(teacher)
    if "table" in start:
        return [StaticEmbedding.load(start["table"]), Normalize()]
    return [StaticEmbedding(Tokenizer.from_file(start["tokenizer"]), embedding_dim=dim), Normalize()]


def distil_model2vec(teacher: str, output: str) -> None:
    """Distill a teacher's vocabulary without reducing the width of its embeddings."""
    from model2vec.distill import distill

    distill(model_name=teacher, pca_dims=None, quantize_to="float32").save_pretrained(output)


def export_wordllama(output: str) -> None:
    """Export the package's own model, a table of tokens that are averaged."""
    import wordllama as package
    from safetensors.numpy import save_file

    model = package.WordLlama.load(cache_dir=Path(package.__file__).parent, disable_download=True)
    model.tokenizer.no_padding()
    model.tokenizer.save(f"{output}/tokenizer.json")
    save_file({"embedding.weight": model.embedding}, f"{output}/model.safetensors")
    module = {"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"}
    Path(output, "modules.json").write_text(json.dumps([module]))


KINDS: dict[str, Callable[..., None]] = {
    "sentence_transformers": train_sentence_transformer,
    "model2vec": distil_model2vec,
    "wordllama": export_wordllama,
}


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]  # its modules could shadow packages
    KINDS[sys.argv[1]](**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
