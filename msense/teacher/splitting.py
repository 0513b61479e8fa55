"""Whether a teacher can be split over several devices, and what each of them then holds: from its config alone.

DeepSpeed's AutoTP cuts the matrices of each layer by the names of their modules, and says nothing where it cuts them wrong.
Hence only model types of which a tiny model gave the same vectors on two ranks as on one, each with half of the weights, are
split; `msense.teacher.parallel` compares again when it has loaded one.
"""

import math
from typing import Any

from msense.errors import InputError
from msense.io.untrusted import printable
from msense.teacher.files import body_folder, loading

SPLIT_TYPES = frozenset({
    "albert", "apertus", "arcee", "bert", "big_bird", "biogpt", "camembert", "cohere", "cohere2",
    "cohere_compass_text", "cwm", "data2vec-text", "deberta-v2", "distilbert", "electra", "ernie", "ernie4_5", "esm",
    "eurobert", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4",
    "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "gte", "helium", "hyperclovax", "internlm3",
    "iquestcoder", "jais2", "layoutlm", "lilt", "llama", "luke", "megatron-bert", "minicpm3", "ministral",
    "ministral3", "mistral", "molmo2_text", "mra", "nemotron", "nomic_bert", "olmo", "opt", "phi", "qwen2", "qwen3",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "seed_oss", "smollm3", "splinter",
    "stablelm", "starcoder2", "tapas", "ultrabert", "vaultgemma", "xglm", "xlm-roberta", "xlm-roberta-xl", "yoso",
    "youtu",
})  # fmt: skip
_FUSED = frozenset({
    "bloom", "codegen", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "modernbert", "modernbert-decoder", "mpt",
    "openai-gpt", "persimmon", "phi3",
})  # fmt: skip
_HEADS = ("num_attention_heads", "num_key_value_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_split(name: str, revision: str | None, ranks: int) -> None:
    """Raise InputError for a teacher that cannot be split over this many ranks; its config.json is all that is read."""
    if ranks == 1:
        return
    from transformers import AutoConfig

    with loading(repr(name)):
        config = AutoConfig.from_pretrained(body_folder(name, revision), trust_remote_code=False).get_text_config()
    if problem := _problem(config, ranks):
        raise InputError(
            f"teacher {name!r} cannot be split over {ranks} ranks: {problem}; omit --ranks and --gpus-per-actor, and if "
            "one GPU cannot hold it, give --offload"
        )


def _problem(config: Any, ranks: int) -> str | None:
    """Return why a model cannot be split, for an error message."""
    kind = printable(config.model_type)
    if any(isinstance(count := getattr(config, key, None), int) and count > 1 for key in _EXPERTS):
        return f"the experts of a {kind} model would not be cut, so that every rank would hold nearly all of it"
    if config.model_type in _FUSED:
        return f"a {kind} model keeps several projections in one matrix, which would be cut in the wrong places"
    if config.model_type not in SPLIT_TYPES:
        return f"{kind} models are not among those that gave the same vectors when they were split"
    counts = {key: count for key in _HEADS if isinstance(count := getattr(config, key, None), int)}
    if (shared := math.gcd(*counts.values())) % ranks:
        fitting = [str(n) for n in range(2, shared + 1) if shared % n == 0]
        heads = " and ".join(f"{key} {count}" for key, count in counts.items())
        return f"its heads ({heads}) give no equal shares; possible are {', '.join(['1', *fitting])}"
    return None
