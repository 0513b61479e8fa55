"""A base model and the two adapters of an LLM2Vec model, as published ones are laid out, with weights of a numpy seed.

Only numpy, safetensors and tokenizers are imported, so that LLM2Vec's environment and that of the tests write the same model.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

EXPECTED = Path(__file__).parents[1] / "fixtures" / "llm2vec" / "expected.json"
NAMES = {"llama3": "meta-llama/Meta-Llama-3-8B-Instruct", "mistral": "mistralai/Mistral-7B-Instruct-v0.2"}
QUERY = "Given a question, find texts that answer it:"
EMOTION = "Name the emotion of the message:"
# (instruction, text). LLM2Vec puts a space between them but counts the tokens of the text without it, so that it pools one
# token too few or too many of a text whose first word is cut otherwise after a space, which no first word here is.
PAIRS = (
    ("", "The bank of the river was steep and full of reeds."),
    ("", "a"),
    ("", "Money in the bank,\nmoney in the river; the game was played on a field near the town, and nobody sang."),
    (QUERY, "where is the bank of the town?"),
    (QUERY, "river"),
    (EMOTION, "the crowd sang for the whole of the second half, and I was full of joy!"),
    (EMOTION, "no reeds"),
)
WORDS = sorted({word for pair in PAIRS for text in pair for word in text.replace(",", " ").split()} | {"user"})
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2}
LINEAR = {  # layers with adapters, and their shapes
    **{f"self_attn.{name}_proj": (rows, 16) for name, rows in (("q", 16), ("k", 8), ("v", 8), ("o", 16))},
    **{"mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32)},
}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_folders(folder: Path, kind: str) -> tuple[Path, Path, Path]:
    """Write a model of a kind ("llama3" or "mistral"); return the folders of base, first and second adapter."""
    base, mntp, supervised = (folder / name for name in ("base", "mntp", "supervised"))
    random = np.random.default_rng(len(kind))
    tokenizer, special = _llama3() if kind == "llama3" else _mistral()
    config = _config(kind, tokenizer.get_vocab_size())
    for path in (base, mntp, supervised):
        path.mkdir(parents=True)
    _write(base / "config.json", config)
    save_file(_weights(random, config["vocab_size"]), base / "model.safetensors", metadata={"format": "pt"})
    code = {"AutoModel": f"modeling_{config['model_type']}_encoder.EncoderModel"}
    _write(mntp / "config.json", config | {"auto_map": code, "_name_or_path": NAMES[kind]})
    for path in (base, mntp):
        tokenizer.save(str(path / "tokenizer.json"))
        _write(path / "tokenizer_config.json", special | {"model_max_length": 512})
    _write_adapter(random, mntp, base, rank=2)
    _write_adapter(random, supervised, base, rank=3)
    return base, mntp, supervised


def write_pooling(folder: Path, mode: str) -> None:
    """Write LLM2Vec's settings beside an adapter."""
    settings = {"pooling_mode": mode, "max_length": 256, "doc_max_length": 200, "skip_instruction": True}
    _write(folder / "llm2vec_config.json", settings)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def _config(kind: str, vocab_size: int) -> dict[str, Any]:
    llama = kind == "llama3"
    name, theta, end = ("Llama", 5e5, 4) if llama else ("Mistral", 1e6, 2)
    own = {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"], "rope_theta": theta}
    own |= {"bos_token_id": int(not llama), "eos_token_id": end, "head_dim": 4}
    own |= {"attention_bias": False} if llama else {"sliding_window": None}
    ends = {"rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu", "torch_dtype": "float32"}
    return {**SIZES, **own, **ends, "vocab_size": vocab_size, "tie_word_embeddings": False}


def _weights(random: np.random.Generator, vocab_size: int) -> dict[str, np.ndarray]:
    """Return the weights of a causal language model; those that LLM2Vec leaves out are its head's."""

    def draw(*shape: int, scale: float = 0.25, middle: float = 0.0) -> np.ndarray:
        return (middle + scale * random.standard_normal(shape)).astype(np.float32)

    weights = {"lm_head.weight": draw(vocab_size, 16), "model.embed_tokens.weight": draw(vocab_size, 16)}
    weights["model.norm.weight"] = draw(16, scale=0.1, middle=1)
    for number in range(SIZES["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        weights |= {f"{layer}.{name}.weight": draw(*shape) for name, shape in LINEAR.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = draw(16, scale=0.1, middle=1)
    return weights


def _write_adapter(random: np.random.Generator, folder: Path, base: Path, rank: int) -> None:
    """Write a LoRA adapter as peft does; unlike a new one, its B is not zero."""
    tensors = {}
    for number in range(SIZES["num_hidden_layers"]):
        for name, (rows, columns) in LINEAR.items():
            for kind, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                key = f"base_model.model.layers.{number}.{name}.lora_{kind}.weight"
                tensors[key] = (0.2 * random.standard_normal(shape)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.rpartition(".")[2] for name in LINEAR]
    own = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": 4, "lora_dropout": 0.05}
    own |= {"target_modules": targets, "bias": "none", "task_type": None, "inference_mode": True}
    _write(folder / "adapter_config.json", own)


def _bpe(special: list[str], alphabet: list[str], words: list[str], **options: Any) -> Tokenizer:
    """Return a BPE that merges the first five letters of words, from left to right."""
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    merges = []
    for word in words:
        for end in range(1, min(len(word), 5 + word.startswith(("Ġ", "▁")))):
            if (merged := word[: end + 1]) not in vocabulary:
                vocabulary[merged] = len(vocabulary)
                merges.append((word[:end], word[end]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _llama3() -> tuple[Tokenizer, dict[str, Any]]:
    """Return a tokenizer like Llama 3's: bytes, and a first token by the template."""
    special = [f"<|{name}|>" for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")]
    words = [start + word for word in WORDS for start in ("", "Ġ")]
    tokenizer = _bpe(special, sorted(pre_tokenizers.ByteLevel.alphabet()), [*words, "ĊĊ"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[4]}
    return tokenizer, names | {"model_input_names": ["input_ids", "attention_mask"]}


def _mistral() -> tuple[Tokenizer, dict[str, Any]]:
    """Return a tokenizer like Mistral's first ones: spaces are letters, and every text starts with one."""
    letters = sorted({letter for pair in PAIRS for text in pair for letter in text} | set("▁[/]INSTuser") - {" "})
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    words = ["▁" + word for word in [*WORDS, "["]]
    tokenizer = _bpe(["<unk>", "<s>", "</s>"], [*bytes_, *letters], [*words, "INST", "▁▁"], **options)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return tokenizer, names | {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False, "legacy": True}
