"""Settings of a distillation: flags, derived defaults, and all errors reported at once."""

import pytest

from msense.cli.flags import parse_flags
from msense.config.distill import DistillConfig
from msense.errors import InputError


def parse(*words: str) -> DistillConfig:
    return parse_flags(DistillConfig, "x", ["--dictionary", "d", *words])


def test_objectives_are_loss_names_with_weights() -> None:
    assert parse("--objective", "sense", "pooled=10").objective == {"sense": 1.0, "pooled": 10.0}
    assert DistillConfig(dictionary="d", objective="pooled").objective == {"pooled": 1.0}
    assert DistillConfig(dictionary="d", objective={"replaced": 2}).objective == {"replaced": 2.0}


def test_defaults_follow_from_other_settings() -> None:
    assert parse("--no-pooled").objective == {"sense": 1.0}
    paper = parse("--reference")
    assert (paper.objective, paper.heads, paper.pooled, paper.epochs) == ({"sense": 1.0}, "one", False, 5)
    assert parse("--reference", "--epochs", "2").epochs == 2


def test_all_errors_are_reported_at_once() -> None:
    wrong = ["--student", "layers:0", "--objective", "sens", "--lr", "0", "--held-out", "0.9", "--text-column", "t"]
    with pytest.raises(InputError) as caught:
        parse_flags(DistillConfig, "x", [*wrong, "--output", "https://x/y"])
    fields = ("dictionary: ", "student: must be layers:N", "objective: sens ", "lr: ", "held_out: ", "text_column: ")
    for part in (*fields, "--corpus", "output: ", "https://"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="--no-pooled"):
        parse("--no-pooled", "--objective", "pooled")
    for weights in (["sense=0"], ["sense=nan"], []):
        with pytest.raises(InputError, match="objective"):
            parse("--objective", *weights)


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags(DistillConfig, "x", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, field in DistillConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in shown
        assert field.description
    assert "Undefined" not in shown


def test_a_setting_affects_the_labels_or_the_training_or_neither() -> None:
    free = ["--workers", "7", "--output", "x", "--dry-run", "--teacher", "t", "--log-level", "error"]
    plain, other = parse(), parse(*free)
    assert (plain.of_labels(), plain.of_training()) == (other.of_labels(), other.of_training())
    assert parse("--temperature", "1").of_labels() == plain.of_labels()  # no weights are stored
    assert parse("--temperature", "1", "--soft-targets", "2").of_labels()["temperature"] == 1
    assert not plain.of_labels().keys() & plain.of_training().keys() - {"temperature"}
