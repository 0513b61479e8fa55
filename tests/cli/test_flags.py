"""Flags and YAML files: the contract's flags through the real commands, precedence, and all errors at once."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import parse_flags

from msense.__main__ import main
from msense.cli.flags import CONFIGS, config_names, read_config
from msense.config.base import JobConfig
from msense.config.build import DEMO_CORPUS, DEMO_SAMPLE, DEMO_SEED, BuildConfig
from msense.config.distill import DistillConfig
from msense.config.finetune import FinetuneConfig
from msense.config.make import MakeConfig
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.evaluation.config import EvaluateConfig

BUILD = """--config FILE --corpus a,b.txt c.txt --text-column body --id-column none --on-bad-document fail
--prompt-column task --dedup --stride 3 --teacher t
--revision main --layer -2 --dtype bfloat16 --max-length 64 --prompt query: --senses 7 --max-occurrences 0 --coverage 0.5
--max-points-per-part 2048 --metric dot --special-tokens include --exemplars 2 --seed 5 --workers 3 --output out --keep
passages centroids --dry-run --sample 0.5 --time-teacher --local --corpus d.txt"""
DISTILL = """--dictionary d --corpus a.txt --train-tokens 100 --student static --objective sense=1 pooled=2 --epochs 2 --lr 1e-3
--workers 2 --output out --local"""
EVALUATE = "--model teacher replaced:d --model truncated:2 --task x=/d y=/e --output e.json --local"
MAKE = "a.txt b/ --teacher t --student table --config FILE --output out --local"
# fmt: off
BUILT = {
    "corpus": ("a,b.txt", "c.txt", "d.txt"), "text_column": "body", "id_column": "none", "prompt_column": "task",
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
MADE = {
    "corpus": ("a.txt", "b/"), "teacher": "t", "student": "table", "output": "out", "local": True, "senses": 9,
}
# fmt: on
COMMANDS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("build", "msense.pipelines.build.build_dictionary", BUILD, BUILT),
    ("distill", "msense.pipelines.distill.distill_student", DISTILL, DISTILLED),
    ("evaluate", "msense.evaluation.run.evaluate", EVALUATE, EVALUATED),
    (
        "finetune",
        "msense.pipelines.finetune.finetune",
        "--task sst2=/d --no-local",
        {"task": "sst2=/d", "local": False},
    ),
    ("make", "msense.pipelines.make.make_student", MAKE, MADE),
]
MODELS: dict[str, type[JobConfig]] = {
    "build": BuildConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "finetune": FinetuneConfig,
    "make": MakeConfig,
}


@pytest.fixture(autouse=True)
def _without_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print help as into a file, whatever the terminal of the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.mark.parametrize(("name", "work", "flags", "expected"), COMMANDS, ids=[command[0] for command in COMMANDS])
def test_commands_accept_every_flag_of_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, work: str, flags: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "run.yaml").write_text("senses: 9\nstore-dtype: bfloat16\n")
    configs: list[JobConfig] = []

    def stop(config: JobConfig) -> None:
        configs.append(config)
        raise InputError("parsed")

    monkeypatch.setattr(work, stop)
    assert main([name, *flags.replace("FILE", str(tmp_path / "run.yaml")).split()]) == 2
    given = configs[0].model_dump(include=set(expected))
    assert given == expected


def test_flags_override_files_and_files_override_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSES", "3")  # the environment is never read
    monkeypatch.setenv("MSENSE_SENSES", "3")
    file = tmp_path / "run.yaml"
    file.write_text("max-occurrences: 50\nmetric: cosine\ncorpus: one.txt\nkeep: [centroids]\ndedup: true\n")
    (tmp_path / "more.yaml").write_text("coverage: 0.5\nkeep: [passages]\n")
    flags = ["--metric", "dot", "--config", str(file), "--no-dedup", "--layer", "1", "--layer=-1"]
    config = parse_flags(BuildConfig, flags)
    assert (config.senses, config.max_occurrences, config.metric, config.dedup) == ("auto", 50, "dot", False)
    assert (config.corpus, config.keep, config.layer, config.coverage) == (("one.txt",), ("centroids",), -1, 1.0)
    config = parse_flags(BuildConfig, [*flags, "--config", str(tmp_path / "more.yaml")])
    assert (config.corpus, config.keep, config.coverage) == (("one.txt",), ("passages",), 0.5)
    words = ["--corpus", "a", '["b", 1]', "--keep", "--senses", "mcl", "--mcl", "inflation=1.8", "expansion=3"]
    config = parse_flags(BuildConfig, words)
    assert (config.corpus, config.keep) == (("a", '["b", 1]'), ())
    assert config.mcl == {"inflation": 1.8, "expansion": 3}


def test_all_errors_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("colour: red\nsense: 3\nseed: s3://me:hunter2@b\n")
    flags = ["--layer", "--coverage", "1.5", "--metric", "l3", "--sense-bugdet=5", "--max-length", "7", "8"]
    with pytest.raises(InputError) as caught:
        parse_flags(BuildConfig, ["--config", str(file), *flags])
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
            parse_flags(BuildConfig, words)
    with pytest.raises(InputError, match="task: required; give it with --task"):
        parse_flags(FinetuneConfig, [])


@pytest.mark.parametrize("name", [*MODELS, "show", "status", "explore"])
def test_every_help_opens_with_a_sentence_and_ends_with_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    usage, _, text = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"Usage: msense {name} ")
    assert re.match(r"[A-Z][a-z-]+ [^\n]+\.\n\n", text), text[:200]
    _, _, examples = text.partition("Examples:\n")
    lines = [line.split("msense ", 1)[1] for line in examples.splitlines() if "msense " in line]
    assert lines[0].startswith(name)
    if name in MODELS:
        for words in (shlex.split(line)[1:] for line in lines if line.startswith(f"{name} ")):
            parse_flags(MODELS[name], ["--corpus", *words] if name == "make" else words)


@pytest.mark.parametrize("name", MODELS)
def test_the_help_describes_every_setting_in_one_group(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS[name]
    listed = [field for names in model.help_groups.values() for field in names]
    assert sorted(listed) == sorted(model.flag_fields())
    assert all(field.description for field in model.flag_fields().values())
    main([name, "--help"])
    text = capsys.readouterr().out
    common, _, _ = text.partition("─ " + list(model.help_groups)[1] if len(model.help_groups) > 1 else "Examples")
    assert all(flag in common for flag in ("--config FILE ...", "--json", "--output TEXT", "--local", "--workers N"))
    assert all("--" + field.replace("_", "-") in text for field in listed)


def test_the_first_help_lists_commands_and_configurations_without_importing_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(f"│ {name} " in text for name in [*MODELS, "show", "status", "explore"])
    assert all(f"  {name} " in text for name in config_names())
    assert "--install-completion" in text
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["biuld"], 'Unknown command "biuld". Did you mean "build"?'),
        (["show", "x"], "give either words to look up or --text"),
        (["show", "x", "y", "--text", "z"], "give either words to look up or --text"),
        (["show", "x", "y", "--senses", "-1"], "-1"),
        (["show", "x", "y", "--sense", "1"], "--sense"),
        (["status", "/nowhere"], "/nowhere is not a run folder"),
        (["explore", "/nowhere"], "nothing at /nowhere: give the folder"),
        (["explore", "/nowhere", "--port", "99999"], "99999"),
        (["explore", "/nowhere", "tree"], "give words and a file together, or neither"),
        (["explore", "/nowhere", "--export", "f"], "give words and a file together, or neither"),
        (["build", "--corpus"], "corpus: no value"),
        (["build", "--config"], "--config: no value"),
        (["build", "--output", "s3://"], "output: names no bucket"),
        (["make", "texts", "--epochs", "0"], "epochs: Input should be greater"),
        (["make", "texts", "--epoch", "3"], "Unknown option: --epoch. Did you mean --epochs?"),
        (["make", "texts", "--dry-run"], "Unknown option: --dry-run"),
        (["make"], "corpus: required"),
        (["distill", "--config", "nothing"], "one of bge, cluster, demo"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words[:1] == ["build"]:
        words = [*words, "--teacher", "t"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_loads_with_the_commands_in_its_first_lines(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    commands = [shlex.split(line[1:]) for line in lines if line.startswith("#   msense ")]
    assert commands
    for _, command, *words in commands:
        assert words[:2] == ["--config", name]
        config = parse_flags(MODELS[command], words)
        assert config.model_fields_set >= read_config(name).keys()


def test_the_demo_configuration_is_the_build_without_settings() -> None:
    demo = {"corpus": [DEMO_CORPUS], "teacher": DEMO_TEACHER, "sample": DEMO_SAMPLE, "seed": DEMO_SEED, "dedup": True}
    assert read_config("demo") == demo


def test_a_file_beside_a_configuration_is_given_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("seed: 3\n")
    assert read_config("demo")["seed"] == DEMO_SEED
    assert read_config("./demo") == {"seed": 3}


def test_make_passes_settings_on_to_the_steps_that_know_them() -> None:
    given = {"epochs": 3, "seed": 5, "max_length": 64, "dedup": True, "text_column": "body", "reference": True}
    build, distill = MakeConfig(
        corpus=("a",), teacher="t", student="layers:2", output="o/", local=True, **given
    ).steps()
    assert (build.corpus, build.teacher, build.output, build.local) == (("a",), "t", "o/dictionary", True)
    assert (build.max_length, build.seed, build.dedup, build.text_column, build.metric) == (64, 5, True, "body", "dot")
    assert (distill.dictionary, distill.output, distill.student) == ("o/dictionary", "o/student", "layers:2")
    assert (distill.epochs, distill.seed, distill.heads, distill.local, distill.teacher) == (3, 5, "one", True, None)
    assert (distill.corpus, distill.dedup) == ((), False)
    build, distill = MakeConfig(corpus=("a",), prompt_column="task").steps()
    assert (build.prompt_column, distill.prompt_column) == ("task", None)
    _, distill = MakeConfig(corpus=("a",), text_column="body", prompt_column="task", queries=("q.jsonl",)).steps()
    assert (distill.queries, distill.text_column, distill.prompt_column) == (("q.jsonl",), "body", "task")
    with pytest.raises(InputError) as caught:
        MakeConfig(corpus=("a",), colour="red", epohcs=3, dry_run=True).steps()
    assert str(caught.value).splitlines()[1:] == [
        "  colour: unknown setting",
        "  epohcs: unknown setting; did you mean epochs?",
        "  dry_run: not a setting of `msense make`; use it with `msense build` and `msense distill`",
    ]
    with pytest.raises(InputError, match="epochs: Input should be greater than or equal to 1"):
        MakeConfig(corpus=("a",), epochs=0).steps()


def test_json_is_one_object_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"stages": {"passages": {"seconds": 1.0}}, "estimate": {"tokens": 7, "budget_bytes": None}}
    monkeypatch.setattr("msense.pipelines.build.build_dictionary", lambda config: summary)
    assert main(["build", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
