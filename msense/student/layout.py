"""The files of a student's folder, in both layouts.

A *portable* student is a model of sentence-transformers, with what only msense reads in `senses/`: it opens without msense
and without remote code. Any other student is a module of one class of msense, in the folder itself.
"""

from pathlib import Path

from msense.dictionary.layout import DictionaryFiles

_PORTABLE = b'"sentence_transformers.'  # class names in modules.json
_START = 1 << 16  # bytes of modules.json that are read


class StudentFiles:
    """Paths of all files of a student folder; its layout is read from the folder unless given.

    Example:
        >>> StudentFiles(Path("runs/mine/student"), portable=True).config
        PosixPath('runs/mine/student/senses/config.json')
    """

    def __init__(self, folder: Path, *, portable: bool | None = None) -> None:
        self.folder = folder
        self.modules = folder / "modules.json"  # for sentence-transformers: the classes that load the folder
        self.portable = _is_portable(folder) if portable is None else portable
        own = folder / "senses" if self.portable else folder
        self.config = own / "config.json"  # written last, so that an incomplete folder is never loaded
        self.weights = folder / "model.safetensors"  # of a portable student: the body's
        self.tokenizer = folder / "tokenizer.json"
        self.dictionary = own / "dictionary"  # optional
        self.card = folder / "README.md"
        self.settings = folder / "config_sentence_transformers.json"  # for sentence-transformers: prompts
        self.onnx = folder / "onnx" / "model.onnx"  # optional
        # of a portable student only:
        self.head = own / "head.safetensors"  # the sense head, if it has one
        self.body_config = folder / "config.json"  # of a transformer, as transformers writes it
        self.tokenizer_config = folder / "tokenizer_config.json"
        self.transformer = folder / "sentence_bert_config.json"
        self.pooling = folder / "1_Pooling" / "config.json"

    def dense(self, number: int) -> Path:
        """Return the folder of a linear layer after pooling, the first of which has number 0."""
        return self.folder / f"{number + 2}_Dense"

    def model_files(self) -> list[Path]:
        """Return the existing files that sentence vectors depend on, the tokenizer first."""
        files = [self.tokenizer, self.weights, self.config]
        if self.portable:
            files += [self.head, self.body_config, self.tokenizer_config, self.transformer, self.pooling]
            files += self.dense_files()
        return [path for path in files if path.is_file()]

    def present(self, *, exemplars: bool) -> list[Path]:
        """Return the existing files of a saved student, with or without the exemplars, which quote the corpus."""
        own = [path for path in (self.card, self.modules, self.settings, self.onnx) if path.is_file()]
        dictionary = DictionaryFiles(self.dictionary)
        shared = [path for path in dictionary.present() if exemplars or path != dictionary.exemplars]
        return self.model_files() + own + shared

    def dense_files(self) -> list[Path]:
        """Return the existing files of linear layers after pooling."""
        folders = [*self.folder.glob("[2-9]_Dense"), *self.folder.glob("[1-9][0-9]_Dense")]
        paths = [folder / name for folder in sorted(folders) for name in ("config.json", "model.safetensors")]
        return [path for path in paths if path.is_file()]


def _is_portable(folder: Path) -> bool:
    """Return whether a folder has the layout of sentence-transformers."""
    modules = folder / "modules.json"
    if (folder / "senses" / "config.json").is_file():
        return True
    if not modules.is_file():
        return False
    with modules.open("rb") as file:
        return _PORTABLE in file.read(_START)
