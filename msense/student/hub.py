"""Download and upload of students on the Hugging Face hub; access tokens are never stored or logged."""

from pathlib import Path

from msense.errors import MsenseError, StudentError
from msense.io import storage
from msense.student.config import StudentFiles
from msense.student.files import checked_path
from msense.teacher.files import local_or_hub_folder
from msense.text import first_line, redact

_FILES = ["*.json", "*.safetensors", "README.md", "dictionary/*"]


def student_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a student: an existing folder, or one downloaded from a store or the hub.

    `token` is for a private repository; default: the one stored on this machine.

    Raises:
        StudentError: no such folder, and no such student on the hub.
        InputError: nothing exists at the URI.
    """
    if isinstance(name, str) and "://" in name:
        return storage.local_copy(name)
    text = str(name.absolute() if isinstance(name, Path) else name)
    return local_or_hub_folder("student", text, _FILES, revision, token, StudentError)


def push_student(
    folder: Path, repo_id: str, *, private: bool = False, exemplars: bool = False, token: str | None = None
) -> str:
    """Upload a student's files to the hub, creating the repository if needed; return the URL of the commit.

    The dictionary's exemplars, which quote the corpus, are left out by default.

    Raises:
        StudentError: a file links outside the folder.
        MsenseError: the name is invalid, or the hub is unavailable or refuses.
    """
    from huggingface_hub import HfApi

    files = StudentFiles(folder)
    names = [checked_path(files, path).relative_to(folder).as_posix() for path in files.present(exemplars=exemplars)]
    message = "Add a student trained with msense"
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=message))
    except (OSError, ValueError) as error:
        raise MsenseError(
            f"cannot push to {redact(repo_id)!r} ({first_line(error)}): check the name (owner/model), the connection and "
            "your write access (hf auth login)"
        ) from error
