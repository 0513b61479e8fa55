"""Download and upload of students on the Hugging Face hub; only a student's own files are transferred.

Access tokens are passed on, and never stored or logged.
"""

from pathlib import Path

from msense.errors import InputError, MsenseError, StudentError
from msense.io import storage
from msense.student.config import StudentFiles
from msense.student.files import checked_path
from msense.text import first_line, redact

_FILES = ["*.json", "*.safetensors", "README.md", "dictionary/*"]


def student_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a student: an existing folder, or one downloaded from a store or the hub.

    Args:
        name: a folder, its URI, or a hub name (owner/model).
        revision: branch, tag or commit on the hub.
        token: for a private repository; default: the one stored on this machine.

    Raises:
        StudentError: no such folder, and no such student on the hub.
        InputError: nothing exists at the URI.
    """
    if isinstance(name, str) and "://" in name:
        return storage.local_copy(name)
    folder, shown = Path(name), redact(str(name))
    try:
        if folder.is_dir():
            return folder
    except (OSError, ValueError) as error:
        raise StudentError(f"student {shown!r} is not a valid name ({error}): give a folder or a hub name") from error
    text = str(name)
    if isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise StudentError(f"student {shown!r}: no such folder: check the path, or give a hub name (owner/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, token=token, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StudentError(
            f"cannot load student {shown!r}: no such local folder, and the hub download failed ({first_line(error)}): "
            "check the name and the connection, or give a folder"
        ) from error


def push_student(
    folder: Path, repo_id: str, *, private: bool = False, exemplars: bool = False, token: str | None = None
) -> str:
    """Upload a student's files to the hub; a missing repository is created.

    Args:
        folder: a complete student.
        repo_id: owner/model.
        private: whether a new repository is private.
        exemplars: whether to upload the dictionary's exemplars, which quote the corpus.
        token: default: the one stored on this machine.

    Returns:
        The URL of the commit.

    Raises:
        InputError: invalid repository name.
        StudentError: a file links outside the folder.
        MsenseError: the hub refuses, or is unavailable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = StudentFiles(folder)
    names = [checked_path(files, path).relative_to(folder).as_posix() for path in files.present(exemplars=exemplars)]
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="A student of msense"
        )
    except HFValidationError as error:
        raise InputError(f"invalid hub name {redact(repo_id)!r} ({first_line(error)}): give owner/model") from error
    except (HfHubHTTPError, OSError) as error:
        raise MsenseError(
            f"cannot push to {redact(repo_id)!r} ({first_line(error)}): check the connection and your write access "
            "(hf auth login)"
        ) from error
    return str(commit)
