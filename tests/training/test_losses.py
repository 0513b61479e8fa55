"""Losses compared with a per-token loop in float64, with values known by hand, and across batch slicings."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make
from torch.utils._python_dispatch import TorchDispatchMode

from msense.constants import NO_SENSE
from msense.dictionary import SenseDictionary, assignment
from msense.dictionary.assignment import RaggedSenses
from msense.student import Student, StudentConfig
from msense.student.config import StaticSizes
from msense.training import sense_losses as sense_losses_module
from msense.training.label_dataset import LabelBatch
from msense.training.losses import (
    LossWeights,
    compute_losses,
    cosine_loss,
    frequent_sense_accuracy,
    mse_loss,
    normalized_loss,
    sense_accuracy,
)
from msense.training.sense_losses import LossSum, SenseLabels, SenseScorer, sense_losses

METRICS = ("l2", "dot", "cosine")
TWO = RaggedSenses(np.array([0, 2, 2]), (torch.tensor([[0.0, 0], [2, 0]]),))  # token 0 has two senses, token 1 none
MIXES = {
    "both": LossWeights(sense=1, pooled=50),
    "raw scores": LossWeights(sense=1, metric="dot", temperature=None),
    "replaced": LossWeights(replaced=1),
    "hidden": LossWeights(mse=1, cosine=1),
    "every": LossWeights(sense=1, pooled=50, replaced=2, mse=3, cosine=4),
}


def cross_entropy(x: torch.Tensor, ids: np.ndarray, labels: SenseLabels, *space: object) -> LossSum:
    return sense_losses(x, ids, labels, SenseScorer(*space), replaced=False)[0]


def soft_replace(x: torch.Tensor, ids: np.ndarray, *space: object) -> torch.Tensor:
    return sense_losses(x, ids, None, SenseScorer(*space), replaced=True)[1]


def draw(seed: int, tokens: int, count: int, most: int) -> tuple[np.ndarray, np.ndarray, RaggedSenses]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, tokens)
    dim = int(rng.integers(1, 6))
    points = torch.from_numpy(rng.normal(size=(sizes.sum(), dim)))
    senses = RaggedSenses(np.concatenate([[0], np.cumsum(sizes)]), (points,))
    return rng.integers(0, tokens, count), rng.normal(size=(count, dim)), senses


def draw_labels(seed: int, ids: np.ndarray, offsets: np.ndarray, soft: int) -> SenseLabels:
    rng = np.random.default_rng(seed)
    sizes = np.diff(offsets)[ids]
    numbers = rng.integers(0, np.maximum(sizes, 1)[:, None], (len(ids), max(1, soft)))
    numbers[(sizes == 0) | (rng.random(len(ids)) < 0.3)] = NO_SENSE
    if not soft:
        return SenseLabels(numbers[:, 0].astype(np.uint16))
    numbers[rng.random(numbers.shape) < 0.2] = NO_SENSE
    return SenseLabels(numbers.astype(np.uint16), rng.random(numbers.shape))


def loop_logits(x: np.ndarray, own: np.ndarray, metric: str, scale: float) -> np.ndarray:
    if metric == "l2":
        return -((x - own) ** 2).sum(1) / scale
    if metric == "cosine":
        own, x = own / np.linalg.norm(own, axis=1, keepdims=True), x / np.linalg.norm(x)
    return own @ x / scale


@settings(max_examples=60, deadline=None)
@given(
    case=st.tuples(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 40), st.integers(0, 7)),
    metric=st.sampled_from(METRICS),
    soft=st.sampled_from([0, 3]),
    scale=st.sampled_from([0.5, 3.0]),
    elements=st.sampled_from([1, 30, 1 << 18]),
)
def test_cross_entropy_and_replacement_equal_a_loop(
    case: tuple, metric: str, soft: int, scale: float, elements: int
) -> None:
    ids, x, senses = draw(*case)
    labels = draw_labels(case[0], ids, senses.offsets, soft)
    want, count, replaced = 0.0, 0, x.copy()
    numbers = labels.numbers if soft else labels.numbers[:, None]
    for i, token in enumerate(ids):
        own = senses.parts[0][senses.offsets[token] : senses.offsets[token + 1]].numpy()
        if not len(own):
            continue
        z = loop_logits(x[i], own, metric, scale)
        log_p = z - z.max() - math.log(np.exp(z - z.max()).sum())
        replaced[i] = np.exp(log_p) @ own
        named = numbers[i] != NO_SENSE
        if named.any():
            weights = np.ones(1) if labels.weights is None else labels.weights[i]
            count += 1
            want -= (log_p[numbers[i][named]] * weights[named]).sum() / weights[named].sum()
    given_x = torch.from_numpy(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(assignment.BATCH_ELEMENTS, "cpu", elements)
        got = cross_entropy(given_x, ids, labels, senses, metric, scale)
        soft_got = soft_replace(given_x, ids, senses, metric, scale)
    assert got.count == count
    assert got.total.item() == pytest.approx(want, abs=1e-9)
    np.testing.assert_allclose(soft_got.numpy(), replaced, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("cached", [0, 1 << 30])
@pytest.mark.parametrize("held", [0, 1 << 24])
def test_both_losses_in_one_call_equal_two_calls(
    metric: str, cached: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sense_losses_module, "MAX_CACHE_BYTES", cached)
    monkeypatch.setattr(sense_losses_module, "MAX_HELD_ELEMENTS", held)
    ids, x, senses = draw(7, 5, 40, 4)
    labels = draw_labels(1, ids, senses.offsets, 2)
    wanted = torch.from_numpy(np.random.default_rng(0).normal(size=x.shape)).float()
    results = []
    for one_call in (False, True):
        given_x = torch.from_numpy(x).float().requires_grad_()
        space = SenseScorer(senses, metric, 0.7)
        loss, means = sense_losses(given_x, ids, labels, space, replaced=one_call)
        means = soft_replace(given_x, ids, senses, metric, 0.7) if means is None else means
        (3 * loss.total + (means * wanted).sum()).backward()
        results.append((loss.total, means, given_x.grad))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("soft", [0, 2])
def test_gradients_equal_finite_differences(metric: str, soft: int) -> None:
    ids, x, senses = draw(5, 4, 9, 4)
    labels = draw_labels(1, ids, senses.offsets, soft)
    given_x = torch.from_numpy(x).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: cross_entropy(e, ids, labels, senses, metric, 0.7).total, given_x)
    assert torch.autograd.gradcheck(lambda e: soft_replace(e, ids, senses, metric, 0.7), given_x)


def test_losses_known_by_hand() -> None:
    x = torch.tensor([[0.5, 3.0], [9, 9], [0.5, 3.0]])
    ids, labels = np.array([0, 1, 0]), SenseLabels(np.array([0, NO_SENSE, NO_SENSE], np.uint16))
    loss = cross_entropy(x, ids, labels, TWO, "l2", 2.0)  # squared distances 9.25 and 11.25: logits differ by 1
    assert (loss.count, loss.total.item()) == (1, pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6))
    assert cross_entropy(x, ids, SenseLabels(np.full(3, NO_SENSE)), TWO, "l2", 1.0).count == 0
    x = torch.tensor([[1.0, 5.0], [9, 9]], dtype=torch.bfloat16)
    assert soft_replace(x, np.array([0, 1]), TWO, "l2", 0.1).tolist() == [[1, 0], [9, 9]]
    assert soft_replace(torch.tensor([[3.0, 5]]), np.zeros(1, int), TWO, "l2", 1e-38).tolist() == [[2, 0]]
    one, other = torch.tensor([[1.0, 0], [2, 2]]), torch.tensor([[0.0, 1], [1, 1]])
    assert (cosine_loss(one, other).total.item(), cosine_loss(one, other).count) == (pytest.approx(1), 2)
    assert mse_loss(one, other).total.item() == pytest.approx(1 + 1)


def test_accuracy_and_its_most_frequent_sense_baseline() -> None:
    d = make([2, 0, 3], dim=2, dtype="float32")
    d.counts[:] = [3, 3, 1, 5, 5]
    d.centroids[:] = torch.tensor([[0.0, 0], [2, 0], [0, 0], [0, 1], [0, 9]])
    ids, labels = np.array([0, 0, 1, 2, 2]), np.array([0, 1, NO_SENSE, 1, 2], np.uint16)
    x = torch.tensor([[0.0, 1], [0, 1], [7, 7], [0, 0], [0, 7]])
    accuracy, baseline = sense_accuracy(x, ids, labels, d), frequent_sense_accuracy(ids, labels, d)
    assert (accuracy.total.item(), accuracy.count) == (2, 4)
    # the most frequent senses are 0 of token 0 and 1 of token 2: ties go to the lowest number
    assert (baseline.total.item(), baseline.count) == (2, 4)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("metric", METRICS)
def test_no_tensor_is_larger_than_the_embeddings_or_a_batch(metric: str) -> None:
    rng = np.random.default_rng(0)
    tokens, k, dim, count = 200, 50, 64, 1500  # [N, K, D] would be 4.8 million numbers
    senses = RaggedSenses(np.arange(tokens + 1) * k, (torch.from_numpy(rng.normal(size=(tokens * k, dim))).float(),))
    ids = rng.integers(0, tokens, count)
    x = torch.from_numpy(rng.normal(size=(count, dim))).float().requires_grad_()
    labels = SenseLabels(rng.integers(0, k, count).astype(np.uint16))
    with Largest() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setitem(assignment.BATCH_ELEMENTS, "cpu", 1 << 16)
        patch.setattr(sense_losses_module, "MAX_HELD_ELEMENTS", 1 << 18)
        patch.setattr(sense_losses_module, "MAX_CACHE_BYTES", 0)
        loss = cross_entropy(x, ids, labels, senses, metric, 1.0).total
        held = [ready.numel() for *_, ready in loss.grad_fn.kept if ready is not None]
        assert 0 < sum(held) <= 1 << 18
        (loss + soft_replace(x, ids, senses, metric, 1.0).sum()).backward()
    assert seen.numel <= max(count * dim, 1 << 16)


def static(dim: int, vocab: int = 6) -> Student:
    given = {"kind": "static", "teacher": {"name": "t"}, "tokenizer_fingerprint": "", "dim": dim, "vocab_size": vocab}
    config = StudentConfig(**given, static=StaticSizes(units=5, kernel_size=3))
    torch.manual_seed(0)
    student = Student(config)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return student.double()


def passages(d: SenseDictionary, rows: slice, left: int = 0) -> tuple[LabelBatch, torch.Tensor]:
    """Return some of eight passages of 1 to 8 tokens as a batch, also padded on the left, and their hidden states."""
    rng, mask = np.random.default_rng(0), np.tri(8, dtype=bool)
    ids = rng.integers(0, d.vocab_size, mask.shape)
    sizes = np.diff(d.offsets)[ids]
    labelled = mask & (sizes > 0) & (rng.random(mask.shape) < 0.8)
    senses = np.where(labelled, rng.integers(0, np.maximum(sizes, 1)), -1)
    sentences, hidden = (torch.from_numpy(rng.normal(size=(*shape, d.dim))) for shape in ((8,), (8, 8)))
    columns = [
        torch.from_numpy(np.pad(values[rows], ((0, 0), (left, 0)), constant_values=padding))
        for values, padding in ((ids, 0), (mask, False), (senses, -1))
    ]
    return LabelBatch(*columns, sentences[rows], None, None), hidden[rows][torch.from_numpy(mask[rows])]


def test_sentence_vectors_leave_out_the_prompts_of_their_passages() -> None:
    """The losses of a batch are those of the same embeddings in which the prompts are padding."""
    d, student = make([3, 0, 2, 5, 1, 4], dim=3, dtype="float32"), static(3)
    batch, _ = passages(d, slice(3, 8))
    skip = torch.tensor([0, 2, 1, 3, 4])
    text = batch.mask & (torch.arange(batch.mask.shape[1]) >= skip[:, None])
    output, mix = student(batch.ids, batch.mask), LossWeights(pooled=1.0, replaced=1.0)

    def masked(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert torch.equal(mask, batch.mask)
        return student.sentence(hidden, text)

    expected = compute_losses(mix, output, batch, mix.space(d), masked)
    losses = compute_losses(mix, output, batch._replace(skip=skip), mix.space(d), student.sentence)
    usual = compute_losses(mix, output, batch, mix.space(d), student.sentence)
    for name in ("pooled", "replaced"):
        torch.testing.assert_close(losses[name].total, expected[name].total)
        assert not torch.isclose(losses[name].total, usual[name].total)
    kept, alone = batch._replace(skip=skip, spans=torch.tensor([True, False, False, True, False])).without_spans()
    assert alone.skip is not None
    assert (kept.tolist(), alone.skip.tolist()) == ([1, 2, 4], [2, 1, 4])


def test_spans_teach_sentence_vectors_only() -> None:
    d, student = make([3, 0, 2, 5, 1, 4], dim=3, dtype="float32"), static(3)
    mix = LossWeights(sense=1.0, pooled=1.0, replaced=1.0)

    def sums(rows: slice, spans: list[int] = ()) -> dict[str, LossSum]:
        batch, _ = passages(d, rows)
        batch = batch._replace(spans=torch.isin(torch.arange(len(batch.ids)), torch.tensor(spans, dtype=torch.int64)))
        output = student(batch.ids, batch.mask, batch.without_spans()[0])
        return compute_losses(mix, output, batch, mix.space(d), student.sentence)

    mixed, passage, only = sums(slice(0, 8), [0, 1, 2, 3]), sums(slice(4, 8)), sums(slice(0, 4), [0, 1, 2, 3])
    assert {name: loss.count for name, loss in only.items()} == {"sense": 0, "replaced": 0, "pooled": 4}
    for name, extra in (("sense", 0), ("replaced", 0), ("pooled", only["pooled"].total)):
        torch.testing.assert_close(mixed[name].total, passage[name].total + extra, rtol=1e-6, atol=1e-6)
    normalized_loss(mix, only, {name: loss.count for name, loss in only.items()}).backward()
    assert student.body.mixer.back.weight.grad.any()
    assert not student.head.weight.grad.any()


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_one_batch_of_eight_equals_two_of_four_and_two_workers(mix: LossWeights) -> None:
    d = make([3, 0, 2, 5, 1, 4], dim=3, dtype="float32")

    def sums(student: Student, *part: object) -> dict[str, LossSum]:
        batch, hidden = passages(d, *part)
        return compute_losses(mix, student(batch.ids, batch.mask), batch, mix.space(d), student.sentence, hidden)

    def stepped(student: Student) -> list[torch.Tensor]:
        """Take one step of plain SGD: Adam would hide a wrong factor."""
        torch.optim.SGD(student.parameters(), lr=0.1).step()
        return [p.detach().clone() for p in student.parameters()]

    whole = static(3)
    losses = sums(whole, slice(0, 8))
    normalized_loss(mix, losses, {name: loss.count for name, loss in losses.items()}).backward()
    want = stepped(whole)

    halves = slice(0, 4), slice(4, 8)
    accumulated = static(3)
    parts = [sums(accumulated, half, left) for half, left in zip(halves, (0, 3), strict=True)]
    counts = {name: parts[0][name].count + parts[1][name].count for name in parts[0]}
    assert counts == {name: loss.count for name, loss in losses.items()}
    for part in parts:
        normalized_loss(mix, part, counts).backward()
    workers = [static(3), static(3)]
    for worker, half in zip(workers, halves, strict=True):
        normalized_loss(mix, sums(worker, half), counts, workers=2).backward()
    for ours, others in zip(workers[0].parameters(), workers[1].parameters(), strict=True):
        if ours.grad is not None:
            ours.grad = (ours.grad + others.grad) / 2  # as data-parallel training does
    for other in (stepped(accumulated), stepped(workers[0])):
        for a, b in zip(want, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(a, b) for a, b in zip(want, static(3).parameters(), strict=True))
