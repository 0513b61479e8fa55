"""The README: every flag, file and command it names exists, and its Python runs."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tiny import with_tokenizer

from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.config.finetune import FinetuneConfig
from msense.evaluation.config import EvaluateConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHER_FLAGS = {"--config", "--help", "--no-pooled", "--no-cost", "--senses", "--exemplars", "--output", "--corpus"}
OTHER_FLAGS |= {"--data"}  # of msense show and jobs/benchmark.py
OTHER_FLAGS |= {"--address", "--working-dir", "--object-store-memory", "--generate"}  # of Ray


def test_every_flag_exists() -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    configs = (BuildConfig, DistillConfig, EvaluateConfig, FinetuneConfig)
    known = {"--" + name.replace("_", "-") for config in configs for name in config.model_fields}
    assert flags <= known | OTHER_FLAGS
    assert len(flags) > 10


def test_every_file_and_target_exists() -> None:
    for name in re.findall(r"\b(?:jobs/)?[a-z_]+\.py\b", README):
        assert (ROOT / name).exists() or list((ROOT / "msense").rglob(name)), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", README)) <= targets


def test_every_benchmark_exists() -> None:
    text = README + (ROOT / "jobs" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"jobs/benchmark\.py ((?:[a-z]+ )*[a-z]+)", text)
    known = set(re.findall(r'^    "(\w+)": "', (ROOT / "jobs" / "benchmark.py").read_text(), flags=re.MULTILINE))
    assert {name for names in named for name in names.split()} - {"measures"} == known != set()


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
