"""Tiny models with random weights of all text families that the installed transformers knows."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from students import dictionary_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from msense import SenseEncoder
from msense.config.build import BuildConfig
from msense.dictionary import SenseDictionary
from msense.dictionary.format import write_tokenizer
from msense.errors import InputError
from msense.student import Student, StudentSettings, init_student, save_pretrained
from msense.student.tokenizer import pad_ids
from msense.teacher.batching import pad_batch
from msense.teacher.body import body_of
from msense.teacher.model import Teacher
from msense.teacher.spec import TeacherInfo, load_teacher_info

VOCABULARY = 64
WORDS = 40  # the first is token 4; a few tokenizers add special tokens of their own
# settings of all configs that have a field of this name; `OWN` comes after
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "entity_emb_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "index_n_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("moe_topk", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_kv", "dim_head", "d_head", "kv_channels", "index_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank"), 16),
    **dict.fromkeys(("intermediate_size", "d_ff", "dim_ff", "dff", "hidden_dim", "d_inner", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "n_inner", "feed_forward_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_hidden_size", "dense_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 80),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 80),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size"), 8),
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
    "unk_token_id": 1,
}
PLAIN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAIN |= {"head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 80, "pad_token_id": 0}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash")
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
}
OWN: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4} for kind in (*LATENT, "minicpm3", "youtu", "esmc")},
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2},
    "bamba": {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING[:2], ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "index_topk": 100, "swa_num_attention_heads": 4}
    | {"swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16}
    | {"swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "funnel": {"block_sizes": [2, 1], "architectures": ["FunnelModel"]},
    "gemma3n_text": {"layer_types": SLIDING, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    **{
        kind: {"layer_types": [*SLIDING[:2], "full_attention"], "hidden_size_per_layer_input": 0, "global_head_dim": 16}
        for kind in ("gemma4_text", "gemma4_unified_text")
    },
    "git": {"vision_config": {**VISION, "patch_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "layer_types": MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": MIXED},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 4, "shape_size": 8},
    "led": {"attention_window": 8},
    "longformer": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 10},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"]},
    "neomme": {"head_dim": 16, "layer_types": SLIDING},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 3, "num_self_attention_heads": 4}
    | {"num_cross_attention_heads": 4},
    **{kind: {"layer_types": MIXED} for kind in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")},
    "qwen4_exp_text": {"layer_types": MIXED, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1}
    | {"indexer_head_dim": 8, "indexer_budget": 512, "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 10], "attn_layers": ["local", "lsh", "local"]}
    | {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64}
    | {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "t5gemma": {part: {**PLAIN, "layer_types": SLIDING} for part in ("encoder", "decoder")},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["hybrid", "hybrid", "linear_attention"], "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
REFUSED: dict[str, str] = {  # families that are no teacher, or no student of some first layers, and why
    "albert": "its layers are one, used several times",
    "bros": "needs the place of every token on a page",
    "esmc": "scales every layer by their number, so that two of its layers compute something else in a smaller model",
    "funnel": "its layers are blocks that halve the number of tokens and a decoder that restores it",
    "gemma3n_text": "one table has the embeddings of all layers (Gemma 4 with `hidden_size_per_layer_input` too)",
    "gpt_neox_japanese": "only its last layer has a bias, so that two first layers do not form a model",
    "hrm_text": "its layers are used in cycles",
    "longcat_flash": "each of its layers counts twice",
    "minicpm3": "scales every layer by their number, as ESMC does",
    "perceiver": "reads text through a preprocessor that `AutoModel` does not have",
    "reformer": "gives two states of each token, by a random hash",
    "t5gemma": "its encoder has no type of its own that `AutoModel` could make",
}
OTHERS = {
    "blt": "reads bytes in patches",
    "emu3": "reads images; its text model is no type of `AutoModel`",
    "mllama": "reads images; its text model is no type of `AutoModel`",
    "voxtral_realtime": "reads sound; its text model is not listed for text alone",
    "phi4_multimodal": "reads images and sound",
    "t5gemma2": "reads images",
}
SOUND = ("whisper", "speech_to_text", "seamless_m4t", "seamless_m4t_v2", "moshi", "musicgen", "musicgen_melody")


def lively(model: nn.Module) -> nn.Module:
    """Give random weights enough size that a wrong vector shows."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.1:
            parameter.data.normal_(0, 0.25)
    return model.eval()


def families() -> list[str]:
    """Return the model types of `AutoModel` that read text alone, without wrappers of another listed type."""
    return [kind for kind in listed() if kind not in left_out()]


def listed() -> list[str]:
    """Return the model types with a head for masked, causal or sequence-to-sequence language modelling."""
    from transformers.models.auto import modeling_auto as auto

    heads = (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    )
    more = {"bros", "layoutlmv3", "lilt", "markuplm", "splinter"}
    return sorted(kind for kind in auto.MODEL_MAPPING_NAMES if kind in more or any(kind in head for head in heads))


def left_out() -> dict[str, str]:
    """Return the listed model types that are not text models, with the reason."""
    from transformers import CONFIG_MAPPING

    reasons = {}
    for kind in listed():
        if kind in OTHERS:
            reasons[kind] = OTHERS[kind]
        elif kind in SOUND:
            reasons[kind] = "reads or writes sound"
        elif "text_config" in CONFIG_MAPPING[kind].sub_configs:
            reasons[kind] = "reads images or sound; its text model is a type of its own"
    return reasons


def tiny_config(kind: str) -> Any:
    """Return the config of a small model."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    own = OWN.get(kind, {})
    names = {field.name for field in fields(config_class)} - set(config_class.sub_configs)
    return config_class(**{name: value for name, value in SIZES.items() if name in names} | own)


def write_tokenizer_of_words(folder: Path) -> None:
    """Write a tokenizer of whole words, from w4 on, with a frame."""
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(4, 4 + WORDS))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = [("<s>", 2), ("</s>", 3)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=frame)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def write_family(folder: Path, kind: str) -> Path:
    """Write a tiny teacher of a family."""
    from transformers import AutoModel

    torch.manual_seed(1)
    lively(AutoModel.from_config(tiny_config(kind))).save_pretrained(folder)
    write_tokenizer_of_words(folder)
    return folder


@dataclass
class Outcome:
    """What the sweep saw of a family: "right", "refused: why" or "wrong: what" for each part."""

    kind: str
    teacher: str = "-"
    batch: str = "-"
    longest: str = "-"
    student: str = "-"
    opened: str = "-"  # by sentence-transformers: "right", or "flag: why one is needed"

    def is_wrong(self) -> bool:
        """Return whether any part is wrong."""
        parts = (self.teacher, self.batch, self.longest, self.student, self.opened)
        return any(part.startswith("wrong") for part in parts)

    def is_refused(self) -> bool:
        """Return whether any part is refused."""
        return any(part.startswith("refused") for part in (self.teacher, self.student))


TEXTS = [
    " ".join(f"w{4 + (n * step) % WORDS}" for n in range(length)) for length, step in ((5, 7), (1, 1), (17, 11), (5, 3))
]


def near(actual: np.ndarray, expected: np.ndarray, part: str) -> str:
    """Return "right", or by how much two arrays differ."""
    scale = max(1e-3, float(np.abs(expected).max()))
    difference = float(np.abs(actual - expected).max()) / scale
    return "right" if difference < 1e-3 else f"wrong: {part} differ by {difference:.2g} of the largest value"


def sweep(kind: str, folder: Path) -> Outcome:
    """Check teacher, batches and students of a family."""
    outcome = Outcome(kind)
    teacher_folder = write_family(folder / "teacher", kind)
    try:
        info, tokenizer = load_teacher_info(str(teacher_folder), BuildConfig())
        teacher = Teacher(str(teacher_folder), revision=None, layer=-1, dtype="float32", device="cpu")
    except InputError as error:
        outcome.teacher = f"refused: {error}"
        return outcome
    rows = [np.array(encoding.ids) for encoding in tokenizer.encode_batch(TEXTS)]
    alone = [teacher.embed(*pad_batch([row]))[0].numpy() for row in rows]
    outcome.teacher = near(
        np.concatenate(alone), np.concatenate([bare(teacher_folder, row) for row in rows]), "vectors"
    )
    parts = []
    for side in ("right", "left"):
        ids, mask = pad_batch(rows, side=side)
        parts.append(near(teacher.embed(ids, mask).numpy()[mask], np.concatenate(alone), f"vectors padded {side}"))
    outcome.batch = next((part for part in parts if part != "right"), "right")
    if outcome.batch == "right" and teacher.inputs.equal_lengths:
        outcome.batch = "by length"
    long = 4 + np.arange(info.max_length) * 7 % WORDS
    outcome.longest = near(teacher.embed(*pad_batch([long]))[0].numpy(), bare(teacher_folder, long), "long vectors")
    if outcome.longest == "right":
        outcome.longest = str(info.max_length)
    outcome.student = students(teacher_folder, folder, info, np.stack([vectors.mean(0) for vectors in alone]))
    if outcome.student == "right":
        outcome.opened = opened(folder / "layers:2")
    return outcome


@torch.no_grad()
def bare(folder: Path, row: np.ndarray) -> np.ndarray:
    """Return the vectors of a text alone by transformers itself."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    model = body_of(model)
    vectors: np.ndarray = model(input_ids=torch.from_numpy(row)[None]).last_hidden_state[0].numpy()
    return vectors


def students(teacher: Path, folder: Path, info: TeacherInfo, expected: np.ndarray) -> str:
    """Make, train, save and load students of all layers and of two."""
    dictionary_of(teacher, max_length=info.max_length).save(folder / "d")
    tokenizer = load_teacher_info(str(teacher), BuildConfig())[1]
    write_tokenizer(folder / "d", tokenizer.to_str())
    dictionary = SenseDictionary.load(folder / "d")
    rows = [np.array(encoding.ids) for encoding in tokenizer.encode_batch(TEXTS)]
    for kind in ("layers:3", "layers:2"):
        try:
            student = init_student(StudentSettings(kind=kind), dictionary, str(teacher))
        except InputError as error:
            return f"refused: {error}"
        if kind == "layers:3":
            save_pretrained(folder / "untrained", student, dictionary)
            if (part := near(encoded(folder / "untrained"), expected, "untrained students")) != "right":
                return part
        if (problem := train_step(student, rows)) is not None:
            return f"wrong: {kind} {problem}"
        save_pretrained(folder / kind, student.eval(), dictionary)
        ids, mask = pad_ids(rows)
        with torch.no_grad():
            trained = student.sentence(student(ids, mask).hidden, mask).numpy()
        if (part := near(encoded(folder / kind), trained, "loaded students")) != "right":
            return part
    return "right"


def encoded(folder: Path) -> np.ndarray:
    """Return the sentence vectors of a saved student."""
    return np.asarray(SenseEncoder.from_pretrained(folder, device="cpu").encode(TEXTS))


def opened(folder: Path) -> str:
    """Open a saved student with sentence-transformers, with the flag only if the student's card says that it needs it."""
    from sentence_transformers import SentenceTransformer

    why = re.search(r"The flag is needed because (.*?): `modules.json`", (folder / "README.md").read_text())
    model = SentenceTransformer(str(folder), trust_remote_code=why is not None, device="cpu")
    part = near(np.asarray(model.encode(TEXTS)), encoded(folder), "vectors of sentence-transformers")
    return part if why is None or part != "right" else f"flag: {why[1]}"


def train_step(student: Student, rows: list[np.ndarray]) -> str | None:
    """Take a step; return what is wrong with it."""
    student.train()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    ids, mask = pad_ids(rows)
    target = torch.randn(int(mask.sum()), student.config.dim, generator=torch.Generator().manual_seed(0))
    (student(ids, mask).senses[mask] - target).square().mean().backward()
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    if lacking := [name for name, p in named if p.grad is None and "expert" not in name]:
        return f"no gradient of {lacking[0]}"
    gradients = [p.grad for _, p in named if p.grad is not None]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return "a gradient is not finite"
    if not any(bool(gradient.any()) for gradient in gradients):
        return "all gradients are zero"
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return None


OPENED = {"right": "without a flag", "flag": "with the flag", "-": "-"}


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the Markdown page of the results."""
    import transformers

    refused = [outcome for outcome in outcomes.values() if outcome.is_refused()]
    rows = [
        f"| {o.kind} | {_cell(o.teacher)} | {_cell(o.batch)} | {o.longest} | {_cell(o.student)} | {OPENED[_cell(o.opened)]} |"
        for o in outcomes.values()
    ]
    reasons = [
        f"| {o.kind} | {'teacher' if o.teacher != 'right' else 'student'} | {REFUSED[o.kind]} |" for o in refused
    ]
    flags = [f"| {o.kind} | {o.opened.partition(': ')[2]} |" for o in outcomes.values() if o.opened.startswith("flag")]
    others = [f"| {kind} | {reason} |" for kind, reason in left_out().items()]
    return "\n".join(
        [
            "# Architectures",
            "",
            f"The {len(outcomes)} text families of transformers {transformers.__version__}, each a tiny model with random "
            f"weights: {len(outcomes) - len(refused)} work as teacher and student; {len(refused)} are refused, as a teacher "
            "or as a student, before the teacher reads a text. Of the students, "
            f"{len(outcomes) - len(refused) - len(flags)} open in sentence-transformers without a flag. "
            "Written by `tests/slow/test_architectures.py`.",
            "",
            "- **teacher**: the vectors of a text are those of `AutoModel` (of an encoder-decoder model, the encoder).",
            "- **batch**: they are the same in a batch padded on the right and on the left. *By length*: texts are run with "
            "others of their length only, as the model reads padding.",
            "- **longest**: tokens of the longest text that was compared with `AutoModel` (512 by default, or all positions of "
            "the tiny model).",
            "- **student**: one of all layers gives the teacher's vectors; it and one of two layers are trained, saved and "
            "loaded.",
            "- **sentence-transformers**: opens the student of two layers, without or with `trust_remote_code=True`, and gives "
            "the same vectors.",
            "",
            "| family | teacher | batch | longest | student | sentence-transformers |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "## Refused",
            "",
            "| family | as | reason |",
            "|---|---|---|",
            *reasons,
            "",
            "## Students that sentence-transformers opens with a flag only",
            "",
            "| family | reason |",
            "|---|---|",
            *flags,
            "",
            "## Not in the sweep",
            "",
            "| family | reason |",
            "|---|---|",
            *others,
            "",
        ]
    )


def _cell(part: str) -> str:
    return part.partition(":")[0]
