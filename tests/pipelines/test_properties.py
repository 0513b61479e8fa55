"""Invariants on random inputs, each compared with a plain loop."""

import json
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from executors import ShuffledExecutor, merged_randomly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer
from transformers import BertModel

from msense import SenseDictionary
from msense.clustering.kmeans import seeding
from msense.clustering.selection import first_by_key
from msense.config.build import BuildConfig
from msense.corpus import chunking, cut_splits, list_files
from msense.corpus.chunking import write_passages
from msense.corpus.passages import Passages, PassageSpec, read_block
from msense.io.arrays import open_parquet
from msense.pipelines.build import build_dictionary
from msense.run.folder import RunFolder
from msense.runtime import LocalExecutor
from msense.runtime.executor import merged
from msense.stages import distributed_kmeans_worker, embedding_store
from msense.stages.embed import select_occurrences
from msense.stages.embedding_store import cut_partitions, record_type
from msense.stages.sampling import Histogram, thresholds

often = settings(max_examples=60, deadline=None, derandomize=True)
seldom = settings(often, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Passage(NamedTuple):
    key: int
    context: int
    ids: list[int]


Taken = dict[int, list[tuple[int, int]]]  # token: (passage, position) of each occurrence


def walk(passages: list[Passage], spec: PassageSpec, cap: int, per_passage: int) -> Taken:
    """Return each token's first `cap` occurrences in the order of (key, corpus order); 0: no limit, for both limits."""
    taken: Taken = defaultdict(list)
    for number in sorted(range(len(passages)), key=lambda n: (passages[n].key, n)):
        _, context, ids = passages[number]
        body = len(spec.prefix) + len(spec.prompt) + context
        here: Counter[int] = Counter()
        for position, token in enumerate(ids):
            if len(spec.prefix) <= position < body or token in spec.excluded:
                continue
            here[token] += 1
            if (not per_passage or here[token] <= per_passage) and (not cap or len(taken[token]) < cap):
                taken[token].append((number, position))
    return {token: sorted(places) for token, places in taken.items() if places}


def block_of(passages: list[Passage]) -> Passages:
    keys, context, ids = zip(*passages, strict=True)
    flat = np.array([i for own in ids for i in own], np.int32)
    return Passages(np.array(keys, np.uint64), np.array(context, np.int32), flat, np.cumsum([0, *map(len, ids)]))


def edges_of(n: int, rng: random.Random) -> list[tuple[int, int]]:
    """Cut 0 to n into consecutive ranges at random."""
    inner = range(1, n)
    return list(pairwise([0, *sorted(rng.sample(inner, rng.randint(0, len(inner)))), n]))


VOCAB = 6
BORDERS = [(quarter << octave) - less for octave in range(18, 62) for quarter in (4, 5, 6, 7) for less in (0, 1)]
KEYS = st.one_of(st.integers(0, 3), st.sampled_from(BORDERS), st.integers(0, 2**64 - 1))  # the first kind often collide
IDS = st.integers(0, VOCAB - 1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def planned(draw: st.DrawFn) -> tuple[PassageSpec, list[Passage]]:
    """Draw passages of any layout; tokens of prefix, prompt and context also occur as ordinary ones."""
    few = st.lists(IDS, max_size=2).map(tuple)
    spec = PassageSpec(64, *(draw(few) for _ in range(3)), excluded=draw(st.sets(IDS, max_size=2).map(tuple)))
    body = st.tuples(KEYS, st.integers(0, 3), st.lists(IDS, min_size=3, max_size=14))
    drawn = draw(st.lists(body, min_size=1, max_size=40))
    return spec, [Passage(k, c, [*spec.prefix, *spec.prompt, *ids, *spec.suffix]) for k, c, ids in drawn]


@often
@given(planned(), st.integers(0, 12), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_sample_equals_a_walk_in_key_order(
    case: tuple[PassageSpec, list[Passage]], cap: int, limit: int, rng: random.Random
) -> None:
    """Each token gets its first max_occurrences occurrences, however blocks are grouped and merged."""
    spec, passages = case
    per_passage = limit if cap else 0
    cut = [block_of(passages[a:b]) for a, b in edges_of(len(passages), rng)]
    groups = [Histogram.empty(VOCAB) for _ in range(rng.randint(1, 5))]
    for block in rng.sample(cut, len(cut)):
        rng.choice(groups).add(block, spec, per_passage)
    histogram = merged_randomly(groups, merged, rng)
    threshold = thresholds(histogram, cap)
    records, first = [], 0  # of all partitions in order: token, key, passage, position
    for a, b in edges_of(len(cut), rng):
        partition = Passages.concatenate(cut[a:b])
        chosen = select_occurrences(partition, threshold, spec, per_passage)
        records += zip(
            chosen["token"], chosen["key"], (chosen["row"] + first).tolist(), chosen["position"].tolist(), strict=True
        )
        first += len(partition.keys)
    columns = [np.array([row[i] for row in records], t) for i, t in ((1, np.uint64), (0, np.int32))]
    got: Taken = defaultdict(list)
    for place in first_by_key(*columns, cap)[0].tolist():
        got[int(records[place][0])].append(records[place][2:])
    assert {token: sorted(places) for token, places in got.items()} == walk(passages, spec, cap, per_passage)
    for counts, most in ((histogram.token_counts, 0), (histogram.counts.sum(axis=1), per_passage)):
        everything = walk(passages, spec, 0, most)
        assert counts.tolist() == [len(everything.get(token, [])) for token in range(VOCAB)]


LEARNT = ["The river bank is deep.", "Ein Flüsschen, naïve façade — 日本語の川 🙂", "  rivers  run"]
ODD = ["long" * 40, " " * 50, "\n\n\t", "👩\u200d👩", "🙂🙂", "日本語", "e\u0301", "ﬁ", "\u2028", "\x00", "[SEP]"]
TEXTS = st.lists(st.one_of(st.text(max_size=25), st.sampled_from([*ODD, *LEARNT])), max_size=12).map("".join)
WORDY = st.lists(st.text(alphabet="ab.é日🙂", min_size=1, max_size=6), min_size=8, max_size=60).map(" ".join)
FRAMES = st.sampled_from([((), (), ""), ((7,), (8,), ""), ((7,), (8, 9), "say: ")])  # prefix, suffix, prompt
TOKENIZERS = {"word pieces": BertWordPieceTokenizer(), "bytes": ByteLevelBPETokenizer()}
for tokenizer in TOKENIZERS.values():
    tokenizer.train_from_iterator(LEARNT * 3, vocab_size=300, show_progress=False)


@often
@given(st.data(), st.sampled_from(list(TOKENIZERS)), FRAMES, st.integers(1, 20), st.booleans())
def test_passages_contain_exactly_the_tokens_of_the_texts(
    data: st.DataObject, kind: str, frame: tuple, length: int, sliced: bool
) -> None:
    """Concatenated bodies equal the plain tokenization; a context repeats the tokens before its body."""
    prefix, suffix, text_of_prompt = frame
    sliced &= not text_of_prompt
    stride = data.draw(st.integers(0, length - 1))
    prompt = tuple(TOKENIZERS[kind].encode(text_of_prompt, add_special_tokens=False).ids)
    longest = length + len(prefix + suffix + prompt)
    spec = PassageSpec(longest, prefix, suffix, prompt, prompt_text=text_of_prompt, stride=stride)
    texts = [*data.draw(st.lists(WORDY if sliced else TEXTS, max_size=4)), "a b"]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name, value in (("BLOCK_TOKENS", 50), ("BATCH_DOCUMENTS", 3), ("SLICE_CHARACTERS", 40 if sliced else 9999)):
            patch.setattr(chunking, name, value)
        corpus, target = Path(folder, "x.jsonl"), Path(folder, "x.parquet")
        corpus.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
        counts = write_passages(*cut_splits(list_files([str(corpus)])), spec, TOKENIZERS[kind], target)
        read = Passages.concatenate([read_block(str(target), block) for block in range(len(counts["blocks"]))])
        names = pq.read_table(target)["document_id"].to_pylist()
    plain: dict[str, list[int]] = {}
    leads: dict[str, tuple[int, ...]] = {}
    for name, text in zip(map(str, range(len(texts))), texts, strict=True):
        whole = TOKENIZERS[kind].encode(text_of_prompt + text, add_special_tokens=False)
        lead = sum(end <= len(text_of_prompt) for _, end in whole.offsets[: len(prompt)])
        leads[name], plain[name] = tuple(whole.ids[:lead]), whole.ids[lead:]
    bodies: dict[str, list[int]] = defaultdict(list)
    for name, column, own in zip(names, read.context, np.split(read.ids, read.offsets[1:-1]), strict=True):
        ids, body = own.tolist(), bodies[name]
        start, stop = len(prefix + leads[name]), len(ids) - len(suffix)
        context = column + len(prompt) - len(leads[name])
        assert (*ids[:start], *ids[stop:]) == prefix + leads[name] + suffix
        assert len(ids) <= spec.max_length
        assert context <= stride
        assert ids[start : start + context] == body[len(body) - context :]
        body += ids[start + context : stop]
    assert bodies == {name: ids for name, ids in plain.items() if ids and texts[int(name)].strip()}


WORD_PIECES = {word: (word,) for word in ["the", "bank", "river", "of", "deep", "cat", "sat", "on"]}
WORD_PIECES |= {"running": ("run", "##ning"), "mats": ("mat", "##s"), "Money": ("money",), "zebra": ("[UNK]",)}
WORD_PIECES |= {"a,dog!": ("a", ",", "dog", "!"), "is...": ("is", ".", ".", ".")}
Corpus = dict[str, list[list[str]]]  # file: lines of words


def random_corpus(seed: int, files: int, lines: int, words: int) -> Corpus:
    rng, corpus = random.Random(seed), {}
    for n in range(files):
        chances = [1 / (rank + 1) for rank in range(len(WORD_PIECES))]
        own = [rng.choices(list(WORD_PIECES), chances, k=rng.randint(1, words)) for _ in range(lines)]
        corpus[f"{n}.txt"] = [*own, [], *rng.choices(own, k=3)]  # a blank line and duplicate documents
    return corpus


def read_run(run: RunFolder, files: int, dedup: bool) -> tuple[dict[str, list[int]], list[Passage], list[list[int]]]:
    """Return the text tokens of every document, the distinct passages in corpus order, and their numbers per partition."""
    text, passages, at, seen = defaultdict(list), [], defaultdict(list), set()
    for split in range(files):
        file = open_parquet(run.passages_file(split))
        for block in range(file.num_row_groups):
            for row in file.read_row_group(block).to_pylist():
                ids = row["input_ids"]
                text[row["document_id"]] += ids[1 + row["context"] : -1]
                if not dedup or tuple(ids) not in seen:
                    at[split, block].append(len(passages))
                    passages.append(Passage(row["key"], row["context"], ids))
                seen.add(tuple(ids))
    partitions = cut_partitions(run.blocks, 16)
    return text, passages, [[n for b in zip(p.splits, p.blocks, strict=True) for n in at[b]] for p in partitions]


def check_run(root: Path, corpus: Corpus, config: BuildConfig, teacher: Path) -> None:
    """Check passages, partitions and dictionary against values computed from the corpus."""
    run, vocabulary = RunFolder(str(root)), Tokenizer.from_file(str(teacher / "tokenizer.json"))
    cap, excluded = config.max_occurrences, (0, 2, 3) if config.special_tokens == "exclude" else (0,)
    spec = PassageSpec(64, (2,), (3,), excluded=excluded)
    text, passages, partitions = read_run(run, len(corpus), config.dedup)
    lines = {f"{name}:{n}": line for name, own in corpus.items() for n, line in enumerate(own) if line}
    assert text == {n: [vocabulary.token_to_id(p) for w in line for p in WORD_PIECES[w]] for n, line in lines.items()}
    model = BertModel.from_pretrained(teacher).eval()
    with torch.inference_mode():
        hidden = [model(torch.tensor([p.ids])).last_hidden_state[0].numpy() for p in passages]
    stored: Taken = defaultdict(list)
    for partition, own in enumerate(partitions):
        for record in np.fromfile(run.partition_file(partition), record_type(16)):
            number, position, token = own[record["row"]], int(record["position"]), int(record["token"])
            assert (passages[number].key, passages[number].ids[position]) == (record["key"], token)
            np.testing.assert_allclose(record["embedding"].view(np.float16), hidden[number][position], atol=0.02)
            stored[token].append((number, position))
    limit = max(1, cap // 20) if cap else 0
    everything, allowed, taken = (walk(passages, spec, *at_most) for at_most in ((0, 0), (0, limit), (cap, limit)))
    dictionary = SenseDictionary.load(root)
    for token in range(dictionary.vocab_size):
        places = set(stored[token])
        assert len(places) == len(stored[token])
        assert set(taken.get(token, [])) <= places <= set(allowed.get(token, []))
        assert dictionary.token_counts[token] == len(everything.get(token, []))
        assert dictionary.senses(token).counts.sum() == len(taken.get(token, []))


CORPORA = st.builds(random_corpus, st.integers(0, 999), st.integers(1, 3), st.integers(1, 25), st.integers(1, 40))
CHOICES = {"max_occurrences": [0, 7, 60], "dedup": [True, False], "stride": [0, 3], "max_length": [12, 40]}
CHOICES |= {"metric": ["l2", "dot", "cosine"], "special_tokens": ["include", "exclude"], "seed": [0, 1]}
SETTINGS = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})
SMALL = [(chunking, "BLOCK_TOKENS", 100), (distributed_kmeans_worker, "BLOCKS_AT_A_TIME", 2)]
SMALL += [(embedding_store, name, (3000, 3000)) for name in ("PARTITION_BYTES", "SHARD_BYTES")]
SMALL += [(seeding, "BLOCK_ROWS", 16)]
FIXED = {"dtype": "float32", "senses": 3, "keep": ("passages", "occurrences")}


@seldom
@given(CORPORA, SETTINGS, st.randoms(use_true_random=False))
@pytest.mark.usefixtures("in_process")
def test_a_build_contains_every_token_once_and_its_bytes_depend_on_the_text_only(
    make_teacher: Callable[..., Path], corpus: Corpus, chosen: dict[str, Any], rng: random.Random
) -> None:
    """Number of clustering workers, order of work, chunk size and location of the corpus do not change the bytes."""
    teacher, artefacts = make_teacher("bert"), []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module, name, value in SMALL:
            patch.setattr(module, name, value)
        for number, points in enumerate((1 << 17, 1 << 17, 32)):
            source, output = Path(folder, f"place{number}"), Path(folder, f"run{number}")
            source.mkdir()
            for name, lines in corpus.items():
                (source / name).write_text("".join(" ".join(line) + "\n" for line in lines))
            given = {"corpus": (str(source),), "teacher": str(teacher), "output": str(output)}
            config = BuildConfig(**given, **FIXED, **chosen).model_copy(update={"max_points_per_part": points})
            build_dictionary(
                config, ShuffledExecutor(rng, number + 1) if number else LocalExecutor(device="cpu", isolate=False)
            )
            if not number:
                check_run(output, corpus, config, teacher)
            files = [path for path in (output / "dictionary").rglob("*") if path.is_file()]
            artefacts.append({str(path.relative_to(output)): path.read_bytes() for path in files})
            shutil.rmtree(source)
    assert artefacts[0] == artefacts[1] == artefacts[2]
