"""Tables at the end of the jobs, from the stats that the stages return."""

from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from msense.cli.reports import show_build, show_distillation, show_finetuning
from msense.config.build import BuildConfig
from msense.pipelines.build import build_dictionary
from msense.stages.label import LabelStats
from msense.stages.passages import PassageStats
from msense.stages.train import TrainStats
from msense.text import size


def test_summaries_show_nested_stats(capsys: pytest.CaptureFixture[str]) -> None:
    passages = asdict(PassageStats(3, 5, 7000, {"empty": 2, "not UTF-8": 1})) | {"seconds": 1.25}
    show_build({"stages": {"passages": passages | {"spilled_bytes": 2_000_000}}, "dictionary": "run/dictionary"})
    stages = {
        "labels": asdict(LabelStats(2, 5, 4, 7000, 6000, 1, 90_000, 800)) | {"seconds": 2.0},
        "training": asdict(TrainStats(2, 30, {"sense": 0.51239, "accuracy": 0.75})) | {"seconds": 3.0},
    }
    show_distillation({"stages": stages, "student": "run/student"})
    show_finetuning({"epochs": [{"train_loss": 0.25}], "seconds": 9.0, "teacher": "t", "corpus": "c"})
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "passages 1.2 s 3 documents, 5 passages, 7,000 tokens, 2.0 MB spilled skipped 3 bad documents (2 empty, 1 not UTF-8)",
        "labels 2.0 s 2 partitions, 5 passages, 4 spans, 7,000 tokens, 6,000 labelled, 1 held out, 90 kB, 800 forwarded",
        "training 3.0 s 2 epochs, 30 steps, held out: sense 0.5124, accuracy 0.75 student run/student",
        "train loss 0.25 seconds 9 teacher t corpus c",
    ):
        assert text in shown


def test_dry_runs_show_all_estimates(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the bank of the river\na cat sat on the mat\n" * 20)
    given = {"corpus": (str(tmp_path / "a.txt"),), "teacher": str(teacher), "output": str(tmp_path / "run")}
    settings = {"dtype": "float32", "dry_run": True, "sample": 0.5, "seed": 1}
    show_build(build_dictionary(BuildConfig(**given, **settings, local=True, time_teacher=True)))
    shown = capsys.readouterr().out
    assert "estimated from 50.00% of the documents" in " ".join(shown.split())
    assert "1 (cpu) for 1 partitions" in shown
    assert "too little text to estimate its time" in shown
    count = sum(tensor.size for tensor in load_file(teacher / "model.safetensors").values())
    weights = f"teacher weights {count:,} parameters, {size(4 * count)} in float32 memory: teacher about"
    assert weights in " ".join(shown.split())
