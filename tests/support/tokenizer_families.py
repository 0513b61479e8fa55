"""Small tokenizers of every family, trained on the spot, and texts and prompts to try them with."""

import random
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = [
    *(
        "the",
        "bank",
        "river",
        "money",
        "near",
        "deep",
        "full",
        "cat",
        "tree",
        "leaf",
        "kernel",
        "memory",
        "query",
        "passage",
    ),
    *(
        "Berlin",
        "Köln",
        "naïve",
        "café",
        "Straße",
        "川",
        "岸",
        "近い",
        "река",
        "банк",
        "2026",
        "3.14",
        "don't",
        "it's",
        "x_1",
    ),
    *("e-mail", "😀", "👍🏽", "½", "\ufb01ne", "İstanbul", "...", "--", "(a)", "[b]", "#tag"),
]
PROMPTS = [
    *(
        "query: ",
        "query:",
        "Represent this sentence: ",
        "passage: \n",
        "Instruct: find texts\nQuery: ",
        "q",
        "The ",
        " ",
    ),
    *("search_query:  ", "文書: ", "ab-", "Ein Satz über"),
]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of words, spaces and punctuation in unusual places."""
    draw = random.Random(seed)
    joints = [" "] * 9 + ["  ", "\n", "\t", ", ", ". ", "-", "", " (", ") ", "\u00a0"]
    made = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(1, 9))
        made.append(draw.choice(["", "", "", " ", "\n"]) + "".join(word + draw.choice(joints) for word in words))
    return made


CORPUS = [prompt + text for text in texts(300, seed=1) for prompt in ("", "query: ", "Represent this sentence: ")]


def template(single: str, **ids: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[(f"<{name}>", i) for name, i in ids.items()])


BOTH = template("<cls> $A <sep>", cls=2, sep=3)
SPECIAL = ["<pad>", "<unk>", "<cls>", "<sep>"]
BYTES = pre_tokenizers.ByteLevel.alphabet()


def trained(model: models.Model, kind: type, *, size: int = 900, **options: object) -> Callable[..., Tokenizer]:
    """Return a function that trains a tokenizer with the given components."""

    def make(**parts: object) -> Tokenizer:
        tokenizer = Tokenizer(model)
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        trainer = kind(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **options)
        tokenizer.train_from_iterator(CORPUS, trainer)
        return tokenizer

    return make


def word_piece(**parts: object) -> Tokenizer:
    return trained(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer)(post_processor=BOTH, **parts)


def byte_level(split: str | None, post: object, *, prefix_space: bool = False, **parts: object) -> Tokenizer:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=split is None)
    if split is not None:
        pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), pre])
    make = trained(models.BPE(), trainers.BpeTrainer, initial_alphabet=BYTES)
    return make(pre_tokenizer=pre, post_processor=post, decoder=decoders.ByteLevel(), **parts)


def unigram(post: object, *normal: object, scheme: str = "always") -> Tokenizer:
    make = trained(models.Unigram(), trainers.UnigramTrainer, size=700, unk_token="<unk>")
    pre = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return make(normalizer=normalizers.Sequence(list(normal)), pre_tokenizer=pre, post_processor=post)


def sentence_piece_bpe(post: object, *normal: object) -> Tokenizer:
    """Train a BPE whose spaces are letters and that is not cut into words, as Llama 2's and Gemma's."""
    make = trained(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False), trainers.BpeTrainer)
    tokenizer = make(
        normalizer=normalizers.Replace(" ", "▁"), pre_tokenizer=pre_tokenizers.Split("▁", "merged_with_next")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = post
    return tokenizer


def suffixed_bpe() -> Tokenizer:
    make = trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainers.BpeTrainer, end_of_word_suffix="</w>"
    )
    return make(
        normalizer=normalizers.Lowercase(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(), post_processor=BOTH
    )


def word_level() -> Tokenizer:
    make = trained(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer)
    return make(pre_tokenizer=pre_tokenizers.Whitespace())


ROBERTA = processors.RobertaProcessing(("<sep>", 3), ("<cls>", 2), trim_offsets=True, add_prefix_space=False)
LLAMA3 = processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<cls> $A", cls=2)])
CHAT = template("<cls> <unk> <pad> $A <sep> <unk>", cls=2, unk=1, pad=0, sep=3)  # a frame of several tokens
NMT = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])

FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "BERT uncased": lambda: word_piece(
        normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer()
    ),
    "BERT cased": lambda: word_piece(
        normalizer=normalizers.BertNormalizer(lowercase=False), pre_tokenizer=pre_tokenizers.BertPreTokenizer()
    ),
    "WordPiece by spaces": lambda: word_piece(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "GPT-2": lambda: byte_level(None, processors.ByteLevel(trim_offsets=False)),
    "GPT-2 with a space first": lambda: byte_level(None, processors.ByteLevel(trim_offsets=True), prefix_space=True),
    "RoBERTa": lambda: byte_level(None, ROBERTA),
    "Llama 3": lambda: byte_level(SPLIT, LLAMA3),
    "Qwen": lambda: byte_level(SPLIT, processors.ByteLevel(trim_offsets=False), normalizer=normalizers.NFC()),
    "Qwen with an end token": lambda: byte_level(SPLIT, template("$A <sep>", sep=3), normalizer=normalizers.NFC()),
    "chat frame": lambda: byte_level(SPLIT, CHAT),
    "Llama 2": lambda: sentence_piece_bpe(template("<cls> $A", cls=2), normalizers.Prepend("▁")),
    "Gemma": lambda: sentence_piece_bpe(template("<cls> $A <sep>", cls=2, sep=3)),
    "XLM-R": lambda: unigram(BOTH, NMT),
    "T5": lambda: unigram(template("$A <sep>", sep=3), NMT, scheme="first"),
    "ALBERT": lambda: unigram(BOTH, NMT, normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()),
    "words ending in </w>": suffixed_bpe,
    "whole words": word_level,
}
