"""The configurations that come with msense: the commands in their first lines, on a small text with a small teacher."""

import shlex
from pathlib import Path

import pytest
from faulty import Corpus

from msense import SenseDictionary, SenseEncoder
from msense.__main__ import main
from msense.cli.flags import CONFIGS, config_names, read_config

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.mark.parametrize("name", config_names())
def test_the_commands_of_every_configuration_run(name: str, made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.folder)
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    commands = [shlex.split(line[1:])[1:] for line in lines if line.startswith("#   msense ")]
    for command, *given in commands:
        words = [command, *given, "--local", "--workers", "1"]
        output = given[given.index("--output") + 1].removeprefix("s3://BUCKET/")
        words += ["--output", output]
        if command == "build":
            if "--corpus" in words:
                words[words.index("--corpus") + 1] = "corpus"
            else:
                words += ["--corpus", "corpus"]
            words += ["--teacher", "teacher", "--sample", "1"]
            words += ["--max-length", "32"] if "max_length" in read_config(name) else []
            assert main(words) == 0
            assert len(SenseDictionary.load(output)) > 20
        else:
            dictionary = given[given.index("--dictionary") + 1]
            if not Path(dictionary).exists():
                made.build(dictionary)
            student = "layers:1" if "layers:2" in given else "static"  # the teacher has two layers
            assert main([*words, "--student", student, "--dtype", "float32"]) == 0
            assert SenseEncoder.from_pretrained(output).encode(["the bank"]).shape == (1, 16)
