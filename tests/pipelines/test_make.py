"""`msense make`: from a text to a measured student, and the same command again."""

import json
from pathlib import Path

import pytest

from msense import SenseDictionary, SenseEncoder
from msense.__main__ import main

LINES = ["the bank of the river is deep", "money is in the bank", "a cat sat on the mat", "the river runs full !"]


def test_make_builds_distills_measures_and_resumes(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # paths are long
    (tmp_path / "texts.txt").write_text("\n".join(f"{a} {b}" for a in LINES for b in LINES) * 4)
    (tmp_path / "small.yaml").write_text("epochs: 2\nsenses: 2\nheld_out: 0.3\n")
    output = tmp_path / "out"
    words = ["make", str(tmp_path / "texts.txt"), "--teacher", str(teacher), "--student", "static", "--local"]
    words += ["--config", str(tmp_path / "small.yaml"), "--output", str(output)]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("cosine to the teacher", "always the most frequent sense", "times the teacher", f"{output}/student"):
        assert text in shown
    assert f"msense show {output}/dictionary WORD" in shown
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    assert main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == written
    assert made["teacher"] == str(teacher)
    assert set(made["held_out"]) >= {"accuracy", "frequent", "pooled_cosine"}
    assert min(made["texts_per_second"].values()) > 0
    assert made["texts_per_second"].keys() == {"teacher", "student"}
    assert SenseEncoder.from_pretrained(made["student"]).encode(["the bank"]).shape == (1, 16)
    assert len(SenseDictionary.load(made["dictionary"]))
    assert main(["status", made["student"], "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["makes"], status["finished"], status["stages"]["labels"]) == (
        "student",
        True,
        {"done": 1, "total": 1},
    )
    assert status["training"] is None
    assert main(["status", made["dictionary"], "--json"]) == 0
    of_dictionary = capsys.readouterr().out
    stages = json.loads(of_dictionary)["stages"]
    assert all(own["done"] == own["total"] for name, own in stages.items() if own["total"] is not None), stages
    assert main(["status", str(output)]) == 0
    shown = capsys.readouterr().out
    assert f"Run {output}/dictionary" in shown
    assert f"Run {output}/student" in shown
    assert main(["status", str(output), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both == {"dictionary": json.loads(of_dictionary), "student": status}
    assert len(SenseDictionary.load(output)) == len(SenseDictionary.load(made["dictionary"]))
    assert main(["show", str(output), "--text", "the bank"]) == 0
