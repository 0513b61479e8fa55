"""The nearest senses of other tokens: exact and by bits, and the index that is kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make

from msense.dictionary import SenseDictionary
from msense.dictionary import neighbours as module
from msense.dictionary.assignment import RaggedSenses
from msense.dictionary.layout import quantize
from msense.dictionary.neighbours import Neighbour, NeighbourIndex
from msense.errors import DictionaryError, InputError


def planted(tokens: int = 600, dim: int = 48) -> RaggedSenses:
    """Return 5 senses per token, of which sense i of each ten tokens are alike; all share a large common part."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(tokens // 10, 5, dim)).repeat(10, 0)
    rows = (topics + 0.2 * rng.normal(size=topics.shape)).reshape(-1, dim) + 50
    halves = torch.from_numpy(rows).float().split(len(rows) // 2 + 1)  # two files, one token across both
    return RaggedSenses(np.arange(0, len(rows) + 1, 5), halves)


def plain_nearest(senses: RaggedSenses, token: int, sense: int, top: int) -> list[tuple[int, int]]:
    rows = torch.cat(senses.parts).double()
    rows = torch.nn.functional.normalize(rows - rows.mean(0))
    scores = rows @ rows[senses.offsets[token] + sense]
    scores[senses.offsets[token] : senses.offsets[token + 1]] = -2
    return [(row // 5, row % 5) for row in scores.argsort(descending=True)[:top].tolist()]


@pytest.mark.parametrize("exact", [True, False])
def test_neighbours_are_those_of_a_plain_search(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 60)  # of 3,000 senses
    monkeypatch.setattr(module, "_SCAN_ROWS", 700)
    senses = planted()
    index = NeighbourIndex.of(senses, exact=exact)
    assert (index.nbytes > 4 * 48) == (not exact)
    hits = 0
    for token in range(0, 600, 37):
        found = index.nearest(token, token % 5, 9)
        assert {n.token // 10 for n in found} == {token // 10}
        assert {n.sense for n in found} == {token % 5}
        assert token not in {n.token for n in found}
        similarities = [n.similarity for n in found]
        assert similarities == sorted(similarities, reverse=True)
        assert similarities[0] < 1
        expected = plain_nearest(senses, token, token % 5, 9)
        hits += len({n[:2] for n in found} & set(expected))
        if exact:
            assert [n[:2] for n in found] == expected
    assert hits >= 0.95 * 9 * len(range(0, 600, 37))


def test_isotropic_senses_are_still_found_by_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    senses = RaggedSenses(np.arange(0, 20_001, 5), (rows,))
    index = NeighbourIndex.of(senses, exact=False)
    monkeypatch.setattr(module, "CANDIDATES", 1_000)
    found = [{n[:2] for n in index.nearest(token, 2)} for token in range(0, 4_000, 200)]
    expected = [set(plain_nearest(senses, token, 2, 10)) for token in range(0, 4_000, 200)]
    assert sum(len(a & b) for a, b in zip(found, expected, strict=True)) >= 0.95 * 10 * len(found)


def test_few_senses_and_invalid_arguments() -> None:
    d = make([2, 0, 1, 3])
    assert {n[:2] for n in d.neighbours(0, 1)} == {(2, 0), (3, 0), (3, 1), (3, 2)}
    assert len(d.neighbours(3, 0, top=2)) == 2
    assert make([4]).neighbours(0, 0) == []
    for arguments, message in (
        ((4, 0), "token 4 is not in the vocabulary: the token ids are 0 to 3"),
        ((1, 0), "token 1 has no senses"),
        ((0, 2), "token 0 has no sense 2: its senses are 0 to 1"),
        ((0, -1), "no sense -1"),
        ((0, 0, 0), "top is 0"),
    ):
        with pytest.raises(InputError, match=message):
            d.neighbours(*arguments)


@pytest.mark.parametrize("exact", [True, False])
def test_damaged_centroids_are_last_and_no_query(exact: bool) -> None:
    rows = torch.randn(6, 4)
    rows[1], rows[4] = torch.nan, torch.inf
    index = NeighbourIndex.of(RaggedSenses(np.array([0, 1, 3, 6]), (rows,)), exact=exact)
    found = index.nearest(0, 0)
    assert {n[:2] for n in found[-2:]} == {(1, 0), (2, 1)}
    assert all(-1.001 <= n.similarity <= 1.001 for n in found)
    with pytest.raises(DictionaryError, match="sense 0 of token 1 is NaN"):
        index.nearest(1, 0)


def test_the_index_is_kept_by_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "EXACT_NUMBERS", 0)
    make([2, 3, 4]).save(tmp_path / "a")
    make([2, 3, 4], seed=1).save(tmp_path / "b")
    expected = SenseDictionary.load(tmp_path / "a").neighbours(0, 0)
    (file,) = (tmp_path / "cache" / "msense" / "neighbours").iterdir()

    made = module._all_bits
    monkeypatch.setattr(module, "_all_bits", lambda *_: pytest.fail("made again"))
    assert SenseDictionary.load(tmp_path / "a").neighbours(0, 0) == expected
    monkeypatch.setattr(module, "_all_bits", made)
    assert SenseDictionary.load(tmp_path / "b").neighbours(0, 0) != expected
    assert len(list(file.parent.iterdir())) == 2

    good = file.read_bytes()
    for damaged in (good[:40], b"", b"{}"):
        file.write_bytes(damaged)
        assert SenseDictionary.load(tmp_path / "a").neighbours(0, 0) == expected
        assert file.read_bytes() == good


def test_a_read_only_cache_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_NUMBERS", 0)
    (tmp_path / "file").write_text("")
    senses = planted(20)
    index = NeighbourIndex.cached(senses, lambda: "f", tmp_path / "file")
    assert index.nearest(0, 0)[0] == NeighbourIndex.of(senses).nearest(0, 0)[0]


def test_a_neighbour_is_named_by_token_and_sense() -> None:
    rows = torch.eye(4)
    rows[3] = torch.tensor([1.0, 0.1, 0.0, 0.0])
    index = NeighbourIndex.of(RaggedSenses(np.array([0, 1, 1, 4]), (rows,)))
    (first, *_) = index.nearest(0, 0)
    assert first[:2] == (2, 2)
    assert isinstance(first, Neighbour)


def test_int8_senses_are_compared_as_they_are_stored() -> None:
    senses = planted(100)
    values, scales = quantize(torch.cat(senses.parts))
    index = NeighbourIndex.of(RaggedSenses(senses.offsets, (values,), scales), exact=False)
    assert {(n.token // 10, n.sense) for n in index.nearest(13, 2, 9)} == {(1, 2)}
