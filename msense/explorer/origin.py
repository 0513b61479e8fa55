"""Where a dictionary comes from: its run, the corpus that was read, and the distortion at other budgets."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from msense.constants import DEMO_TEACHER
from msense.dictionary.layout import TeacherName
from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.manifest import kind_of
from msense.teacher.files import DEMO_PACKAGE

_SHOWN = 20  # files of a corpus


@dataclass(frozen=True)
class Origin:
    """What a run read."""

    kind: str  # what it made: a dictionary, or a student on this text
    corpus: tuple[str, ...]  # as it was given
    files: tuple[str, ...]  # the first that were read
    more_files: int
    stats: dict[str, int]  # documents, passages and tokens; empty if unknown
    curve: tuple[tuple[int, float], ...]  # senses in total, and estimated mean squared distance


def read_origin(source: str) -> Origin | None:
    """Return what the run of a dictionary or student read; None without a run, or with records of another version."""
    for run in map(RunFolder, _roots(source)):
        if (manifest := run.read_manifest()) is not None:
            with suppress(LookupError, TypeError, ValueError, AttributeError):
                stages = (storage.read_json(run.finished) or storage.read_json(run.summary) or {}).get("stages", {})
                return _origin(manifest, stages)
    return None


def present_teacher(source: str, teacher: TeacherName) -> str | None:
    """Return folder or name of the teacher of a dictionary if it is on this machine, and the packages to run it are."""
    if find_spec("deepspeed") is None:
        return None
    for root in _roots(source):
        if (folder := RunFolder(root).teacher_folder()) is not None:
            return folder
    if teacher.name == DEMO_TEACHER:
        return teacher.name if find_spec(DEMO_PACKAGE) else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(teacher.name, "config.json", revision=teacher.revision)
    except ValueError:  # no name of the hub
        return None
    return teacher.name if isinstance(cached, str) else None


def _roots(source: str) -> Iterator[str]:
    """Yield the run folders that a source may be, be in or contain."""
    yield source
    yield storage.join(source, "dictionary")
    if parent := source.rstrip("/").rpartition("/")[0]:
        yield parent


def _origin(manifest: dict[str, Any], stages: Any) -> Origin:
    passages, senses = (stages.get(name, {}) for name in ("passages", "senses"))
    files = [str(name) for name in manifest["inputs"]]
    return Origin(
        kind=kind_of(manifest),
        corpus=tuple(map(str, manifest["corpus"])),
        files=tuple(files[:_SHOWN]),
        more_files=len(files[_SHOWN:]),
        stats={name: int(passages[name]) for name in ("documents", "passages", "tokens") if name in passages},
        curve=tuple((int(x), float(y)) for x, y in senses.get("budget_curve", ())),
    )
