"""Corpora other than files: docstrings of installed packages (`pydocs`) and Hub datasets (`hf://`)."""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from documents import pairs, read, splits_of, write_table
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from msense.corpus import files, list_files, read_documents
from msense.corpus.pydocs import docstrings
from msense.errors import InputError

Patch = pytest.MonkeyPatch
PACKAGE = {
    "__init__.py": '"""The package."""\nraise RuntimeError("imported")\n',
    "broken.py": "def f(:\n",
    "nul.py": '"""x"""\0',
    "sub/deep.py": '''class Outer:
    """Outer   text.

        Indented.
    Last.
    """
    class Inner:
        """Inner."""
        async def method(self):
            """Method."""
            def local():
                "Local."
    @property
    def size(self):
        """Get."""
    @size.setter
    def size(self, value):
        """Set."""
    def silent(self):
        pass
if True:
    try:
        pass
    except ValueError:
        def fallback():
            """   """
''',
}


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: Patch) -> None:
    for name, source in PACKAGE.items():
        (tmp_path / "tinydocs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tinydocs" / name).write_text(source)
    (tmp_path / "tinymodule.py").write_text('"""A module."""\n')
    monkeypatch.syspath_prepend(tmp_path)


def test_pydocs_reads_docstrings_without_importing(tiny_package: None) -> None:
    rows = read("pydocs:tinydocs")
    assert pairs(rows) == [
        ("tinydocs/__init__.py", "The package."),
        ("tinydocs/broken.py", "unparsable source"),
        ("tinydocs/nul.py", "unparsable source"),
        ("tinydocs/sub/deep.py:Outer", "Outer   text.\n\n    Indented.\nLast."),
        ("tinydocs/sub/deep.py:Outer.Inner", "Inner."),
        ("tinydocs/sub/deep.py:Outer.Inner.method", "Method."),
        ("tinydocs/sub/deep.py:Outer.Inner.method.local", "Local."),
        ("tinydocs/sub/deep.py:Outer.size", "Get."),
        ("tinydocs/sub/deep.py:Outer.size#2", "Set."),
        ("tinydocs/sub/deep.py:fallback", "empty"),
    ]
    assert "SyntaxError" in rows[1].detail
    assert "tinydocs" not in sys.modules


def test_pydocs_splits_names_and_samples(tiny_package: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr("msense.corpus.splits.PYDOCS_FILES", 3)
    splits = [p for p in splits_of("pydocs:tinydocs", "pydocs:tinymodule,fsspec") if p.name != "pydocs/fsspec"]
    expected = [("pydocs/tinydocs", 0, 3), ("pydocs/tinydocs", 3, 4), ("pydocs/tinymodule", 0, 1)]
    assert [(p.name, p.start, p.stop) for p in splits] == expected
    assert pairs(list(read_documents(splits[2]))) == [("pydocs/tinymodule.py", "A module.")]
    samples = [
        [row.id.split(":")[0] for split in splits[:2] for row in read_documents(split, sample=0.5, seed=seed)]
        for seed in range(20)
    ]
    # A source file is sampled with all its documents, or not at all.
    assert {names.count("pydocs/tinydocs/sub/deep.py") for names in samples} == {0, 7}
    assert {names.count("pydocs/tinydocs/broken.py") for names in samples} == {0, 1}


def test_pydocs_fingerprint_is_the_version(tiny_package: None) -> None:
    listed = list_files(["pydocs:filelock,tinydocs"])
    assert listed[0].fingerprint == importlib.metadata.version("filelock")
    assert listed[1].fingerprint.startswith("changed ")
    assert listed[1].size == sum(len(source) for source in PACKAGE.values())


def test_pydocs_default_packages_and_packages_without_source(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "specless", ModuleType("specless"))
    for name in ("nosuchpackage", "numpy.linalg", "specless"):
        with pytest.raises(InputError, match=rf"no package '{name}' is installed here; pip install it"):
            list_files([f"pydocs:filelock,{name}"])
    with pytest.raises(InputError, match="'sys' has no Python source"):
        list_files(["pydocs:sys"])
    monkeypatch.setattr("msense.corpus.pydocs.DEFAULT_PACKAGES", ("nosuchpackage", "filelock"))
    assert [file.name for file in list_files(["pydocs"])] == ["filelock"]
    monkeypatch.setattr("msense.corpus.pydocs.DEFAULT_PACKAGES", ("nosuchpackage",))
    with pytest.raises(InputError, match="none of nosuchpackage is installed"):
        list_files(["pydocs"])


def test_docstrings_ignore_warnings_and_number_repeated_names() -> None:
    source = b'"""\\d"""\ndef f():\n    "1"\ndef f():\n    "2"\ndef f():\n    "3"\n'
    assert docstrings(source) == [("", "\\d"), ("f", "1"), ("f#2", "2"), ("f#3", "3")]


class FakeHub(DirFileSystem):
    """A local folder with the interface of the Hub's filesystem, with a commit in expanded listings."""

    def ls(self, path: str, detail: bool = True, expand_info: bool = False, **options: object) -> list:
        infos = super().ls(path, detail=detail, **options)
        return [info | {"last_commit": SimpleNamespace(oid="c0ffee")} for info in infos] if expand_info else infos


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Callable[..., None]:
    root = tmp_path / "datasets" / "org" / "name@refs%2Fconvert%2Fparquet"
    monkeypatch.setattr(files, "hub_filesystem", lambda: FakeHub(str(tmp_path), LocalFileSystem()))

    def add(place: str, *texts: str) -> None:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        write_table(root / place, text=list(texts))

    return add


def test_hub_dataset_with_one_config(hub: Callable[..., None]) -> None:
    hub("plain/train/0001.parquet", "two")
    hub("plain/train/0000.parquet", "one")
    hub("plain/test/0000.parquet", "test")
    expected = [("plain/train/0000.parquet:0", "one"), ("plain/train/0001.parquet:0", "two")]
    assert pairs(read("hf://org/name")) == expected
    assert pairs(read("hf://org/name::test")) == [("plain/test/0000.parquet:0", "test")]
    (file,) = list_files(["hf://org/name:plain:test"])
    assert file.fingerprint.startswith("c0ffee ")
    assert file.uri == "hf://datasets/org/name@refs%2Fconvert%2Fparquet/plain/test/0000.parquet"
    names = {file.name for file in list_files(["hf://org/name", "pydocs:filelock"])}
    assert names == {"name/plain/train/0000.parquet", "name/plain/train/0001.parquet", "pydocs/filelock"}


def test_hub_configs_and_splits_are_listed_if_ambiguous(hub: Callable[..., None]) -> None:
    hub("a/train/0000.parquet", "a")
    hub("b/validation/0000.parquet", "b")
    for name, message in [
        ("name", "hf://org/name: no config 'default'; choose one of a, b: hf://org/name:CONFIG"),
        ("name:b", "no split 'train'; choose one of validation: hf://org/name:b:SPLIT"),
        ("none", r"hf://org/none: the Hub provides no parquet files for it .*hf auth login"),
        ("name:a:train:x", "write hf://dataset"),
    ]:
        with pytest.raises(InputError, match=message):
            list_files([f"hf://org/{name}"])
    hub("default/train/0000.parquet", "default")
    assert [text for _, text in pairs(read("hf://org/name"))] == ["default"]
