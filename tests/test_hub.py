"""Students on the hub: what is pushed, what is fetched, and what it says when it cannot."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from students import TEXTS, outside

from msense import SenseEncoder, hub
from msense.errors import BadInput, MsenseError, StudentError


class FakeApi:
    """Stands for the hub."""

    calls: list[tuple[str, dict]]

    def __init__(self, token: str | None = None) -> None:
        FakeApi.calls = [("token", {"token": token})]

    def create_repo(self, repo_id: str, **told: object) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **told}))

    def upload_folder(self, **told: object) -> str:
        from huggingface_hub.utils import filter_repo_objects

        root = Path(str(told["folder_path"]))
        paths = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
        sent = sorted(filter_repo_objects(paths, allow_patterns=told["allow_patterns"]))
        self.calls.append(("upload", {"repo_id": told["repo_id"], "sent": sent}))
        return "https://hub/commit"


def test_pushing_leaves_exemplars_and_other_files_at_home(
    shipped_student: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    shutil.copytree(shipped_student[3], tmp_path / "s")
    for name in ("training.json", "secret.txt", "evil.py", "dictionary/notes.json"):
        (tmp_path / "s" / name).write_text("{}")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.push_to_hub("me/student", private=True, token="hf_secret") == "https://hub/commit"
    assert FakeApi.calls[:2] == [
        ("token", {"token": "hf_secret"}),
        ("create", {"repo_id": "me/student", "private": True, "exist_ok": True}),
    ]
    sent = FakeApi.calls[2][1]["sent"]
    assert sent == [
        *("README.md", "config.json", "config_sentence_transformers.json"),
        *("dictionary/README.md", "dictionary/config.json", "dictionary/dictionary.safetensors"),
        *("dictionary/tokenizer/tokenizer.json", "model.safetensors", "modules.json", "tokenizer.json"),
    ]
    encoder.push_to_hub("me/student", exemplars=True)
    assert set(FakeApi.calls[2][1]["sent"]) - set(sent) == {"dictionary/exemplars.parquet"}
    assert "hf_secret" not in caplog.text
    outside(tmp_path / "s" / "README.md")
    with pytest.raises(StudentError, match="outside the student"):
        encoder.push_to_hub("me/student")


def test_a_hub_that_refuses_is_told(shipped_student: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    for error, match in (
        (OSError("no route"), "'me/student' could not be pushed .no route.: check the connection"),
        (HFValidationError("bad"), "'me/student' is no name for the hub"),
    ):

        class Broken(FakeApi):
            def create_repo(self, repo_id: str, reason: Exception = error, **told: object) -> None:
                raise reason

        monkeypatch.setattr("huggingface_hub.HfApi", Broken)
        with pytest.raises(MsenseError, match=match) as refusal:
            shipped_student[0].push_to_hub("me/student", token="hf_secret")
        assert "hf_secret" not in str(refusal.value)


def test_a_student_by_its_name_on_the_hub(
    shipped_student: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--me--student"
    snapshot = repository / "snapshots" / "0123"
    asked: list[tuple] = []

    def download(name: str, **told: object) -> str:
        """Lay a student out as the hub's cache does: links from the snapshot to blobs."""
        asked.append((name, told["revision"], told["token"]))
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(p for p in shipped_student[3].rglob("*") if p.is_file()):
            link = snapshot / path.relative_to(shipped_student[3])
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, repository / "blobs" / str(number))
            link.symlink_to(repository / "blobs" / str(number))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    encoder = SenseEncoder.from_pretrained("me/student", revision="v1", token="hf_secret")
    assert asked == [("me/student", "v1", "hf_secret")]
    np.testing.assert_array_equal(encoder.encode(TEXTS), shipped_student[0].encode(TEXTS))
    assert encoder.tokens("bank the river") == shipped_student[0].tokens("bank the river")
    encoder.save(tmp_path / "copy", exemplars=False)
    assert not [p for p in (tmp_path / "copy").rglob("*") if p.is_symlink() or p.suffix in (".parquet", ".py")]
    copy = SenseEncoder.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(copy.encode(TEXTS), shipped_student[0].encode(TEXTS))
    assert all(t.exemplar is None for t in copy.tokens("bank the river"))
    with pytest.raises(BadInput, match="is where this student lies"):
        copy.save(tmp_path / "copy")
    (snapshot / "model.safetensors").unlink()
    shutil.copy(shipped_student[3] / "model.safetensors", tmp_path / "elsewhere")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StudentError, match="outside the student"):
        SenseEncoder.from_pretrained(snapshot)


def test_a_student_that_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to https://user:pw@hub/x?token=1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        StudentError, match="'me/student' is no folder here and could not be had from the hub"
    ) as refusal:
        SenseEncoder.from_pretrained("me/student")
    assert "pw@" not in str(refusal.value)
    for name in (tmp_path / "nowhere", "/no/where", "./x", "a/b/c"):
        with pytest.raises(StudentError, match="there is no such folder"):
            SenseEncoder.from_pretrained(name)
    with pytest.raises(StudentError, match="no usable name"):
        hub.student_folder("x" * 5000)
