"""Settings: flags over YAML over defaults, and every error at once."""

from pathlib import Path

import pytest

from msense.cli.flags import parse_flags
from msense.config.build import BuildConfig
from msense.errors import InputError


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("senses: 7\nmax-occurrences: 50\nmetric: cosine\ncorpus: one.txt\nkeep: [centroids]\ndedup: true\n")
    config = parse_flags(BuildConfig, "x", ["--metric", "dot", "--config", str(file), "--no-dedup", "--workers", "3"])
    assert (config.senses, config.max_occurrences, config.metric, config.dedup) == (7, 50, "dot", False)
    assert (config.corpus, config.keep, config.workers, config.coverage) == (("one.txt",), ("centroids",), 3, 1.0)
    assert parse_flags(BuildConfig, "x", ["--corpus", "a", "b", "--keep"]).corpus == ("a", "b")
    assert parse_flags(BuildConfig, "x", ["--corpus", "a", "--corpus", "b", "c"]).corpus == ("a", "b", "c")


def test_all_errors_are_shown_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("colour: red\nsenses: few\n")
    with pytest.raises(InputError) as caught:
        parse_flags(BuildConfig, "x", ["--config", str(file), "--coverage", "1.5", "--metric", "l3"])
    for told in ("colour", "must be a number from 1 to 65534, auto or mcl", "coverage", "metric"):
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [("[1, 2]", "must hold `setting: value` lines"), ("a: [", "cannot read"), ("\udcff", "cannot read")],
)
def test_files_that_are_no_settings_are_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=told):
        parse_flags(BuildConfig, "x", ["--config", str(file)])
    with pytest.raises(InputError, match=r"cannot read the config file .*none.yaml"):
        parse_flags(BuildConfig, "x", ["--config", str(tmp_path / "none.yaml")])


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags(BuildConfig, "x", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, field in BuildConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in shown
        assert field.description


def test_a_passage_gives_a_twentieth_of_the_cap_at_most() -> None:
    assert [BuildConfig(max_occurrences=n).per_passage for n in (0, 5, 20, 1000)] == [0, 1, 1, 50]


def test_what_does_not_change_results_is_left_out_of_the_manifest() -> None:
    plain = BuildConfig()
    other = BuildConfig(workers=7, output="elsewhere", keep=(), dry_run=True, max_points_per_part=2048)
    assert plain.of_results() == other.of_results()
    assert plain.of_results() != BuildConfig(seed=1).of_results()
