"""Students on the Hugging Face hub: a name in, a folder out; a folder in, a repository there.

Only the files of a student go either way. Tokens are handed on and never written or told. Holds nothing.
"""

from pathlib import Path

from msense import storage
from msense.errors import BadInput, MsenseError, StudentError
from msense.student.config import StudentFiles
from msense.student.files import inside
from msense.text import first_line, redact

_FILES = ("*.json", "*.safetensors", "README.md", "dictionary/*")


def student_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a student: a folder as it is, or fetched from a store or the hub.

    Args:
        name: a folder, its URI, or a hub name (owner/model).
        revision: branch, tag or commit on the hub.
        token: for a private repository; default: the one that is stored on this machine.

    Raises:
        StudentError: there is no such folder, and no such student could be had from the hub.
        BadInput: nothing is at the URI.
    """
    if isinstance(name, str) and "://" in name:
        return storage.local_copy(name)
    folder, shown = Path(name), redact(str(name))
    try:
        if folder.is_dir():
            return folder
    except (OSError, ValueError) as error:
        raise StudentError(f"student {shown!r} is no usable name ({error}): give a folder or a hub name") from error
    text = str(name)
    if isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise StudentError(
            f"student {shown!r}: there is no such folder: check the path, or give a hub name (owner/model)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, token=token, allow_patterns=list(_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StudentError(
            f"student {shown!r} is no folder here and could not be had from the hub ({first_line(error)}): check the name "
            "and the connection, or give a folder"
        ) from error


def push_student(
    folder: Path, repo_id: str, *, private: bool = False, exemplars: bool = False, token: str | None = None
) -> str:
    """Upload a student's files to the hub; a repository is made if there is none.

    Args:
        folder: a whole student.
        repo_id: owner/model.
        private: whether a new repository is private.
        exemplars: whether the dictionary's examples go too: they quote the corpus.
        token: default: the one that is stored on this machine.

    Returns:
        The address of the commit.

    Raises:
        BadInput: the name is none.
        StudentError: a file leads out of the folder.
        MsenseError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = StudentFiles(folder)
    there = [inside(files, path) for path in files.present(exemplars=exemplars)]
    names = [path.relative_to(folder).as_posix() for path in there]
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="A student of msense"
        )
    except HFValidationError as error:
        raise BadInput(
            f"{redact(repo_id)!r} is no name for the hub ({first_line(error)}): write owner/model"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise MsenseError(
            f"{redact(repo_id)!r} could not be pushed ({first_line(error)}): check the connection and that you may write "
            "there (hf auth login)"
        ) from error
    return str(commit)
