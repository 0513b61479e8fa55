"""Flags and YAML files: the contract's flags through the real jobs, precedence, and all errors at once."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from msense.cli.console import run_job
from msense.cli.flags import parse_flags
from msense.config.base import JobConfig
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.config.finetune import FinetuneConfig
from msense.errors import InputError
from msense.evaluation.config import EvaluateConfig

BUILD = """--config FILE --corpus a,b.txt c.txt --text-column body --id-column none --on-bad-document fail
--dedup --stride 3 --teacher t
--revision main --layer -2 --dtype bfloat16 --max-length 64 --prompt query: --senses 7 --max-occurrences 0 --coverage 0.5
--max-points-per-part 2048 --metric dot --special-tokens include --exemplars 2 --seed 5 --workers 3 --output out --keep
passages centroids --dry-run --sample 0.5 --time-teacher --local --corpus d.txt"""
DISTILL = """--dictionary d --corpus a.txt --train-tokens 100 --student static --objective sense=1 pooled=2 --epochs 2 --lr 1e-3
--workers 2 --output out --local"""
EVALUATE = "--model teacher replaced:d --model truncated:2 --task x=/d y=/e --output e.json --local"
# fmt: off
BUILT = {
    "corpus": ("a,b.txt", "c.txt", "d.txt"), "text_column": "body", "id_column": "none",
    "on_bad_document": "fail", "dedup": True, "stride": 3,
    "teacher": "t", "revision": "main", "layer": -2, "dtype": "bfloat16", "max_length": 64, "prompt": "query:", "senses": 7,
    "max_occurrences": 0, "coverage": 0.5, "max_points_per_part": 2048, "metric": "dot", "special_tokens": "include",
    "exemplars": 2, "seed": 5, "workers": 3, "output": "out", "keep": ("passages", "centroids"), "dry_run": True,
    "sample": 0.5, "time_teacher": True, "local": True, "store_dtype": "bfloat16",  # the last from the file
}
DISTILLED = {
    "dictionary": "d", "corpus": ("a.txt",), "train_tokens": 100, "student": "static", "epochs": 2, "lr": 1e-3, "workers": 2,
    "objective": {"sense": 1.0, "pooled": 2.0}, "output": "out", "local": True,
}
EVALUATED = {
    "model": ("teacher", "replaced:d", "truncated:2"), "task": ("x=/d", "y=/e"), "output": "e.json", "local": True,
}
# fmt: on
JOBS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("build_dict", "build_dictionary", BUILD, BUILT),
    ("distill", "distill_student", DISTILL, DISTILLED),
    ("evaluate", "evaluate", EVALUATE, EVALUATED),
    ("finetune", "finetune", "--task sst2=/d --output out --no-local", {"task": "sst2=/d", "output": "out"}),
]


@pytest.mark.parametrize(("name", "work", "flags", "expected"), JOBS, ids=[job[0] for job in JOBS])
def test_jobs_accept_every_flag_of_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, work: str, flags: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "run.yaml").write_text("senses: 9\nstore-dtype: bfloat16\n")
    spec = importlib.util.spec_from_file_location(f"{name}_job", Path(__file__).parents[2] / "jobs" / f"{name}.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    configs: list[JobConfig] = []

    def stop(config: JobConfig) -> None:
        configs.append(config)
        raise InputError("parsed")

    monkeypatch.setattr(job, work, stop)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.replace("FILE", str(tmp_path / "run.yaml")).split()])
    assert run_job(job.main) == 2
    given = configs[0].model_dump(include=set(expected))
    assert given == expected


def test_flags_override_the_file_and_the_file_overrides_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENSES", "3")  # the environment is never read
    monkeypatch.setenv("MSENSE_SENSES", "3")
    file = tmp_path / "run.yaml"
    file.write_text("max-occurrences: 50\nmetric: cosine\ncorpus: one.txt\nkeep: [centroids]\ndedup: true\n")
    config = parse_flags(
        BuildConfig, "x", ["--metric", "dot", "--config", str(file), "--no-dedup", "--layer", "1", "--layer=-1"]
    )
    assert (config.senses, config.max_occurrences, config.metric, config.dedup) == ("auto", 50, "dot", False)
    assert (config.corpus, config.keep, config.layer, config.coverage) == (("one.txt",), ("centroids",), -1, 1.0)
    words = ["--corpus", "a", '["b", 1]', "--keep", "--senses", "mcl", "--mcl", "inflation=1.8", "expansion=3"]
    config = parse_flags(BuildConfig, "x", words)
    assert (config.corpus, config.keep) == (("a", '["b", 1]'), ())
    assert config.mcl == {"inflation": 1.8, "expansion": 3}


def test_all_errors_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("colour: red\nsense: 3\nseed: s3://me:hunter2@b\n")
    flags = ["--layer", "--coverage", "1.5", "--metric", "l3", "--sense-bugdet=5", "--max-length", "7", "8"]
    with pytest.raises(InputError) as caught:
        parse_flags(BuildConfig, "x", ["--config", str(file), *flags])
    assert str(caught.value).splitlines()[1:] == [
        "  layer: Input should be a valid integer (given: [])",
        "  max_length: Input should be a valid integer (given: ['7', '8'])",
        "  seed: Input should be a valid integer, unable to parse string as an integer (given: 's3://b')",
        "  coverage: Input should be less than or equal to 1 (given: '1.5')",
        "  metric: Input should be 'l2', 'dot' or 'cosine' (given: 'l3')",
        "  colour: unknown setting",
        "  sense: unknown setting; did you mean senses?",
        "  '--sense-bugdet': unknown flag; did you mean --sense-budget?",
    ]
    for words, message in ((["teacher"], "'teacher': unknown argument"), (["--dedup=maybe"], "--dedup")):
        with pytest.raises(InputError, match=message):
            parse_flags(BuildConfig, "x", words)
    with pytest.raises(InputError, match="task: required; give it with --task"):
        parse_flags(FinetuneConfig, "x", [])


@pytest.mark.parametrize("model", [BuildConfig, DistillConfig, FinetuneConfig, EvaluateConfig])
def test_the_help_describes_every_setting(model: type[JobConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags(model, "First [line].", ["--help"])
    assert not caught.value.code
    common, _, expert = capsys.readouterr().out.partition("Expert options")
    assert "First [line]." in common
    assert all(flag in common for flag in ("--config FILE", "--output TEXT", "--local --no-local", "--workers N"))
    assert "--seed N" in expert
    for name, field in model.model_fields.items():
        assert "--" + name.replace("_", "-") in common + expert
        assert field.description
