"""The README: every flag, file and command it names is there, and its Python runs."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import with_tokenizer

from msense.config import BuildConfig
from msense.distill_config import DistillConfig
from msense.evaluation.config import EvaluateConfig
from msense.finetune_config import FinetuneConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_is_there() -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    configs = (BuildConfig, DistillConfig, EvaluateConfig, FinetuneConfig)
    fields = [name for config in configs for name in config.model_fields]
    known = {"--" + name.replace("_", "-") for name in fields} | {"--config", "--help", "--no-pooled", "--no-cost"}
    known |= {"--senses", "--exemplars", "--output", "--corpus", "--data"}  # of show and bench too
    known |= {"--address", "--working-dir", "--object-store-memory", "--generate"}  # of Ray
    assert flags <= known
    assert len(flags) > 10


def test_every_file_and_target_is_there() -> None:
    for name in re.findall(r"\b(?:jobs/)?[a-z_]+\.py\b", README):
        assert (ROOT / name).exists() or list((ROOT / "msense").rglob(name)), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", README)) <= targets


def test_its_python_runs(tmp_path: Path, make_teacher: Callable[..., Path]) -> None:
    from students import shipped
    from tokenizers import Tokenizer, models

    shipped(make_teacher("bert"), tmp_path / "runs" / "student" / "student")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "cell": 1}, unk_token="[UNK]"))
    with_tokenizer(tokenizer, tmp_path / "runs" / "demo", [0, 4])
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for block, printed in zip(blocks, ("[bank]", "'cell' is in the dictionary"), strict=True):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert printed in done.stdout


@pytest.mark.slow
def test_bench_prints_one_json_object_last(tmp_path: Path) -> None:
    import json

    command = [sys.executable, str(ROOT / "jobs" / "bench.py"), "plan", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(figures) == {"plan.read_fraction", "plan.coverage_fraction", "plan.tokens_per_s_core"}
    assert 0 < figures["plan.coverage_fraction"] < figures["plan.read_fraction"] <= 0.35
