"""Settings: validation, values that follow from others, and which settings the results depend on."""

import pytest

from msense.config.base import validate_config
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.errors import InputError


def distill(**settings: object) -> DistillConfig:
    return validate_config(DistillConfig, {"dictionary": "d", **settings})


def test_occurrences_per_passage_are_a_twentieth_of_the_cap() -> None:
    assert [BuildConfig(max_occurrences=n).per_passage for n in (0, 5, 20, 1000)] == [0, 1, 1, 50]


def test_settings_without_influence_on_the_results_are_not_in_the_manifest() -> None:
    free = {"workers": 7, "output": "elsewhere", "local": True, "dry_run": True, "gpus_per_actor": 0.5}
    build = BuildConfig().of_results()
    assert build == BuildConfig(**free, keep=(), max_points_per_part=2048, task_memory="4GB").of_results()
    assert build != BuildConfig(seed=1).of_results()
    plain, other = distill(), distill(**free, teacher="t")
    assert (plain.of_labels(), plain.of_training()) == (other.of_labels(), other.of_training())
    assert distill(temperature=1).of_labels() == plain.of_labels()  # no weights are stored
    assert distill(temperature=1, soft_targets=2).of_labels()["temperature"] == 1
    assert not plain.of_labels().keys() & plain.of_training().keys() - {"temperature"}


def test_ranks_of_a_teacher() -> None:
    for settings, ranks in (
        ({}, 1),
        ({"gpus_per_actor": 0.5}, 1),
        ({"gpus_per_actor": 4}, 4),
        ({"ranks": 2}, 2),
        ({"gpus_per_actor": 2, "ranks": 2}, 2),
        ({"gpus_per_actor": 0.5, "ranks": 1, "offload": True}, 1),
    ):
        assert (BuildConfig(**settings).teacher_ranks, distill(**settings).teacher_ranks) == (ranks, ranks)
        assert BuildConfig(**settings).of_results() == BuildConfig().of_results()
    for settings, message in (
        ({"gpus_per_actor": 2.5}, "gpus_per_actor: GPUs are whole above 1.* 2, 4 or 8"),
        ({"gpus_per_actor": 4, "ranks": 2}, "ranks: each rank has a GPU of its own.*--gpus-per-actor 4"),
        ({"gpus_per_actor": 0.5, "ranks": 2}, "ranks: .*--gpus-per-actor 0.5"),
        ({"ranks": 2, "offload": True}, "offload: .*one GPU"),
        ({"gpus_per_actor": 2, "offload": True}, "offload: .*one GPU"),
        ({"ranks": 0}, "ranks: "),
    ):
        with pytest.raises(InputError, match=message):
            validate_config(BuildConfig, settings)


def test_defaults_follow_from_other_settings() -> None:
    assert distill(objective=["sense", "pooled=10"]).objective == {"sense": 1.0, "pooled": 10.0}
    assert (distill(objective="pooled").objective, distill(objective={"replaced": 2}).objective["replaced"]) == (
        {"pooled": 1},
        2,
    )
    assert (distill().heads, distill(objective="sense replaced").heads) == ("two", "one")
    assert (distill(student="static").heads, distill(student="static", objective="pooled").heads) == ("separate", "one")
    assert distill().objective == {"sense": 3.0, "pooled": 100.0, "replaced": 10.0}, "they share a body"
    assert distill(student="static").objective == {"sense": 10.0, "pooled": 100.0, "replaced": 100.0}
    table = distill(student="table")
    assert (table.objective, table.heads, table.ship_senses) == ({"pooled": 100.0}, "one", "none")
    assert distill(pooled=False).objective == {"sense": 1.0}
    paper = distill(reference=True)
    assert (paper.objective, paper.heads, paper.pooled, paper.epochs) == ({"sense": 1.0}, "one", False, 5)
    assert distill(reference=True, epochs=2).epochs == 2
    assert BuildConfig(reference=True).metric == "dot"
    assert BuildConfig(reference=True, metric="l2", special_tokens="auto").metric == "l2"


def test_all_errors_are_reported_at_once() -> None:
    wrong = {"student": "layers:0", "objective": ["sens"], "lr": 0, "held_out": 0.9, "text_column": "t"}
    with pytest.raises(InputError) as caught:
        validate_config(DistillConfig, {**wrong, "reference": "yes", "output": "https://x/y"})
    parts = ("dictionary: ", "student: must be layers:N", "objective: unknown loss sens;", "lr: ", "held_out: ")
    for part in (*parts, "reference: ", "text_column: ", "--corpus", "output: ", "https://"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="--no-pooled"):
        distill(pooled=False, objective="pooled")
    wrong = {"student": "table", "objective": "sense", "ship_senses": "int8", "heads": "separate", "spans": "word"}
    with pytest.raises(InputError) as caught:
        distill(**wrong)
    for part in (
        "objective: a table has no context",
        "ship_senses: a table knows no senses",
        "heads: separate",
        "spans: ",
    ):
        assert part in str(caught.value)
    for weights in (["sense=0"], ["sense=nan"], ["sense="], []):
        with pytest.raises(InputError, match="objective"):
            distill(objective=weights)
