"""Small random teachers."""

import json
from pathlib import Path


def write_teacher(folder: Path, kind: str = "bert", pooling: str | None = None, prompt: str | None = None) -> Path:
    """Write a small random teacher into a folder.

    kind "bert" (or "roberta", "t5") has [CLS] and [SEP]; "llama" a BOS and nothing else, and its layer 0 is its
    embedding table, so that every occurrence of a token has the same, known embedding. `pooling` and `prompt` write
    sentence-transformers settings.
    """
    import torch
    import transformers
    from tiny import WORDS
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    llama = kind == "llama"
    special = ["<pad>", "<unk>", "<s>"] if llama else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, "run", "##ning", "##s", *".,!"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special[1]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    frame = "<s> $A" if llama else "[CLS] $A [SEP]"
    numbered = [(token, number) for number, token in enumerate(special) if token in frame]
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=numbered)
    names = dict(
        zip(("pad_token", "unk_token", "bos_token" if llama else "cls_token", "sep_token"), special, strict=False)
    )
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"max_position_embeddings": 64}
    if kind == "t5":
        sizes = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 32, "d_kv": 8}
    elif kind == "roberta":
        sizes |= {"pad_token_id": 0}
    else:
        sizes |= {"initializer_range": 0.5}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(vocabulary), **sizes)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)
    tokenizer.save_pretrained(folder)
    if pooling:
        kinds = {"": "Transformer", "1_Pooling": "Pooling"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{module}"} for path, module in kinds.items()]
        (folder / "1_Pooling").mkdir()
        (folder / "modules.json").write_text(json.dumps([m | {"name": str(n)} for n, m in enumerate(modules)]))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    if prompt:
        settings = {"prompts": {"query": prompt}, "default_prompt_name": "query"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder
