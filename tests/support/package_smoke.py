"""Try a built wheel as a user would: `python tests/support/package_smoke.py DIST --python PYTHON` (make package-test).

Makes a small student with this environment, installs the wheel's base dependencies and nothing else into a new one, and uses the
student there, in a folder outside the checkout. Prints a line per check.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = (
    "ray",
    "deepspeed",
    "pandas",
    "sklearn",
    "scipy",
    "xxhash",
    "s3fs",
    "gcsfs",
    "datasets",
    "sentence_transformers",
)
USE = """
import importlib.util, sys
import msense
assert not {"torch", "transformers"} & set(sys.modules), "import msense is slow"
from msense import SenseDictionary, SenseEncoder
encoder = SenseEncoder.from_pretrained("student")
print("vectors", encoder.encode(["the bank of the river", ""]).shape)
print("senses of", *(sense.token for sense in encoder.tokens("the bank")))
print("dictionary", SenseDictionary.load("dictionary").lookup(sys.argv[1]).explain())
print("absent", *(name for name in sys.argv[2:] if importlib.util.find_spec(name) is None))
"""
BUILD_API = (
    "from msense.config.build import BuildConfig as C; from msense.pipelines.build import build_dictionary as b; b(C())"
)


def main() -> None:
    """Run all checks; exit with an error at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    (wheel,), (sdist,) = given.dist.glob("*.whl"), given.dist.glob("*.tar.gz")
    check_contents(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        check_contents([name.partition("/")[2] for name in archive.getnames()])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        word = make_student(place)
        python = install(wheel.resolve(), place / "venv", given.python)
        use(place, python, word)


def check_contents(names: list[str]) -> None:
    """Check which files a distribution has."""
    assert not [name for name in names if name.startswith(("tests", "jobs", ".ci", "benchmarks"))], names
    assert {"msense/py.typed", "msense/configs/demo.yaml", "msense/cli/show.py"} <= set(names), names
    report("contents", f"{len(names)} files")


def make_student(folder: Path) -> str:
    """Write student/ (with its senses) and dictionary/, of a random teacher; return a word with senses."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]
    from students import shipped
    from teachers import write_teacher
    from tiny import WORDS

    from msense import SenseDictionary

    shipped(write_teacher(folder / "teacher"), folder / "student")
    (folder / "student-dictionary").rename(folder / "dictionary")
    dictionary = SenseDictionary.load(folder / "dictionary")
    return next(word for word in WORDS if dictionary.lookup(word).found)


def install(wheel: Path, venv: Path, python: str) -> Path:
    """Install a wheel with the pinned versions of its base dependencies; return the environment's Python."""
    run([python, "-m", "venv", venv], venv.parent)
    own = venv / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, wheel], venv.parent)
    report("installed", run([own, "--version"], venv.parent))
    return own


def use(place: Path, python: Path, word: str) -> None:
    """Use the student, the dictionary and the command line."""
    used = run([python, "-I", "-c", USE, word, *ABSENT], place)
    absent = used.splitlines()[-1].split()[1:]
    assert absent == list(ABSENT), f"installed with the base: {set(ABSENT) - set(absent)}"
    report("student", used)
    msense = python.with_name("msense")
    for words in (["--help"], *([name, "--help"] for name in ("build", "distill", "finetune", "evaluate", "make"))):
        report("help", run([msense, *words], place).splitlines()[2])
    report("show", run([msense, "show", "dictionary", word], place).splitlines()[0])
    report("version", run([python, "-I", "-m", "msense", "--version"], place))
    command = 'pip install "msense[build]"'
    report("build", refused := run([msense, "build", "--output", "run"], place, code=2))
    assert refused.count("\n") == 0, refused
    assert command in refused, refused
    assert command in run([python, "-I", "-c", BUILD_API], place, code=1)
    train = 'pip install "msense[train]"'
    assert train in run([msense, "distill", "--dictionary", "dictionary"], place, code=2)
    assert train in run([msense, "finetune", "--task", "sst2=data"], place, code=2)
    assert train in run([msense, "make", "texts", "--output", "run"], place, code=2)
    words = ["evaluate", "--model", "student:student", "--task", "a=data"]
    assert 'pip install "msense[evaluation]"' in run([msense, *words], place, code=2)


def run(command: list[str | Path], folder: Path, code: int = 0) -> str:
    """Run a command in a folder, without this checkout on its path; return its output and check its exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != code:
        sys.exit(f"{' '.join(words)} exited with {done.returncode}, not {code}:\n{done.stdout}{done.stderr}")
    return (done.stdout + done.stderr).strip()


def report(name: str, text: str) -> None:
    """Print the outcome of a check."""
    sys.stdout.write(f"{name:<10} {text.replace(chr(10), chr(10) + ' ' * 11)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
