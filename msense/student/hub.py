"""Upload of a student's own files to the Hugging Face hub."""

from msense.errors import MsenseError
from msense.student.files import checked_path
from msense.student.layout import StudentFiles
from msense.text import first_line, redact


def push(files: StudentFiles, repo_id: str, *, private: bool, exemplars: bool, token: str | None) -> str:
    """Upload a student's files, creating the repository if needed; return the URL of the commit.

    Raises:
        StudentError: a file links outside the folder.
        MsenseError: the name is invalid, or the hub is unavailable or refuses.
    """
    from huggingface_hub import HfApi

    paths = (checked_path(files, path) for path in files.present(exemplars=exemplars))
    names = [path.relative_to(files.folder).as_posix() for path in paths]
    message = "Add a student trained with msense"
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        uploaded = api.upload_folder(
            repo_id=repo_id, folder_path=files.folder, allow_patterns=names, commit_message=message
        )
    except (OSError, ValueError) as error:
        raise MsenseError(
            f"cannot push to {redact(repo_id)!r} ({first_line(error)}): check the name (owner/model), the connection "
            "and your write access (hf auth login)"
        ) from error
    return str(uploaded)
