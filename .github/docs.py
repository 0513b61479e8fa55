"""For mkdocs: collects the pages of `nav` from the repository, the files that they link to, and a reference."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
REFERENCE = (  # public modules and classes
    *("msense.SenseEncoder", "msense.student.token_senses.TokenSense", "msense.student.save_pretrained"),
    *("msense.SenseDictionary", "msense.dictionary.sense_dictionary.Senses", "msense.dictionary.DictionaryConfig"),
    *("msense.clustering.budget.SenseBudget", "msense.clustering.mcl.MclConfig"),
    *("msense.config.build.BuildConfig", "msense.pipelines.build.build_dictionary"),
    *("msense.config.distill.DistillConfig", "msense.pipelines.distill.distill_student"),
    *("msense.config.make.MakeConfig", "msense.pipelines.make.make_student"),
    *("msense.config.finetune.FinetuneConfig", "msense.pipelines.finetune.finetune"),
    *("msense.evaluation.config.EvaluateConfig", "msense.evaluation.run.evaluate"),
    "msense.errors",
)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages, the other files that they link to, and the reference."""
    pages = [name for entry in config.nav or () for name in entry.values()]
    wanted = dict.fromkeys(pages)
    for name in pages:
        if (ROOT / name).is_file():
            wanted |= dict.fromkeys(linked(name))
    for name in wanted:
        content = reference() if name == "reference.md" else (ROOT / name).read_bytes()
        file = File.generated(config, name, content=content, inclusion=InclusionLevel.INCLUDED)
        files.append(file)
    return files


def linked(page: str) -> list[str]:
    """Return the files of the repository that a page links to, with paths from the root."""
    targets = re.findall(r"\]\(([^)#:]+)", (ROOT / page).read_text(encoding="utf-8"))
    paths = [(ROOT / page).parent.joinpath(target).resolve() for target in targets]
    return [path.relative_to(ROOT).as_posix() for path in paths if path.is_file()]


def reference() -> str:
    """Return the page of the reference."""
    return "# Python reference\n\n" + "\n".join(f"::: {name}\n" for name in REFERENCE)


class Examples(Extension):
    """Shows the section `Example:` of docstrings as code, like `Examples:`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
