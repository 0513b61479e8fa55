"""Students on the hub: which files are uploaded and downloaded, and the errors of both."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from students import TEXTS, outside

from msense import SenseEncoder
from msense.errors import InputError, MsenseError, StudentError
from msense.student import hub


class FakeApi:
    """Stands for the hub's client."""

    calls: list[tuple[str, object]]
    error: Exception | None = None

    def __init__(self, token: str | None = None) -> None:
        FakeApi.calls = [("token", token)]

    def create_repo(self, repo_id: str, **options: object) -> None:
        if self.error:
            raise self.error
        self.calls.append((repo_id, options))

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> str:
        from huggingface_hub.utils import filter_repo_objects

        paths = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        self.calls.append((repo_id, sorted(filter_repo_objects(paths, allow_patterns=allow_patterns))))
        return "https://hub/commit"


def test_push_uploads_a_students_own_files_without_exemplars(
    shipped_student: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    shutil.copytree(shipped_student[3], tmp_path / "s")
    for name in ("training.json", "secret.txt", "evil.py", "dictionary/notes.json"):
        (tmp_path / "s" / name).write_text("{}")
    encoder = SenseEncoder.from_pretrained(tmp_path / "s")
    assert encoder.push_to_hub("me/student", private=True, token="hf_secret") == "https://hub/commit"
    files = [
        *("README.md", "config.json", "config_sentence_transformers.json"),
        *("dictionary/README.md", "dictionary/config.json", "dictionary/dictionary.safetensors"),
        *("dictionary/tokenizer/tokenizer.json", "model.safetensors", "modules.json", "tokenizer.json"),
    ]
    created = ("me/student", {"private": True, "exist_ok": True})
    assert FakeApi.calls == [("token", "hf_secret"), created, ("me/student", files)]
    encoder.push_to_hub("me/student", exemplars=True)
    assert FakeApi.calls[2] == ("me/student", sorted([*files, "dictionary/exemplars.parquet"]))
    assert "hf_secret" not in caplog.text
    outside(tmp_path / "s" / "README.md")
    with pytest.raises(StudentError, match="outside the student"):
        encoder.push_to_hub("me/student")


def test_failed_push_names_the_cause_but_no_token(shipped_student: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "error", OSError("no route"))
    with pytest.raises(MsenseError, match=r"cannot push to 'me/student' \(no route\): check the name") as refusal:
        shipped_student[0].push_to_hub("me/student", token="hf_secret")
    assert "hf_secret" not in str(refusal.value)


def test_student_loads_from_the_hub_and_saves_as_plain_files(
    shipped_student: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, _, _, folder = shipped_student
    repository = tmp_path / "models--me--student"
    snapshot = repository / "snapshots" / "0123"
    requests: list[tuple] = []

    def download(name: str, revision: str, token: str, **_: object) -> str:
        """Lay out a student as the hub's cache does: links from the snapshot to blobs."""
        requests.append((name, revision, token))
        (repository / "blobs").mkdir(parents=True)
        for number, path in enumerate(p for p in folder.rglob("*") if p.is_file()):
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(shutil.copy(path, repository / "blobs" / str(number)))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    downloaded = SenseEncoder.from_pretrained("me/student", revision="v1", token="hf_secret")
    assert requests == [("me/student", "v1", "hf_secret")]
    np.testing.assert_array_equal(downloaded.encode(TEXTS), encoder.encode(TEXTS))
    assert downloaded.tokens("bank the river") == encoder.tokens("bank the river")
    downloaded.save(tmp_path / "copy", exemplars=False)
    assert not [p for p in (tmp_path / "copy").rglob("*") if p.is_symlink() or p.suffix in (".parquet", ".py")]
    copy = SenseEncoder.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(copy.encode(TEXTS), encoder.encode(TEXTS))
    assert all(t.exemplar is None for t in copy.tokens("bank the river"))
    with pytest.raises(InputError, match="own folder"):
        copy.save(tmp_path / "copy")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere"))
    with pytest.raises(StudentError, match="outside the student"):
        SenseEncoder.from_pretrained(snapshot)


def test_unavailable_student_is_an_error_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to https://user:pw@hub/x?token=1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(StudentError, match=r"cannot load student 'me/student': .*no route to https://hub/x") as refusal:
        SenseEncoder.from_pretrained("me/student")
    assert "token=" not in str(refusal.value)
    for name in (tmp_path / "nowhere", "/no/where", "./x", "a/b/c"):
        with pytest.raises(StudentError, match="no such folder: check the path"):
            SenseEncoder.from_pretrained(name)
    with pytest.raises(StudentError, match="is not a valid name"):
        hub.student_folder("x" * 5000)
