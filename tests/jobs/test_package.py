"""Wheel and sdist: what they contain. `make package-test` also installs and uses the wheel."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from package_smoke import check_contents

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


def test_distributions_have_the_package_and_no_tests(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("msense", "jobs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        scripts = next(archive.read(name) for name in names if name.endswith("entry_points.txt"))
    check_contents(names)
    assert b"msense = msense.__main__:main" in scripts
    assert {name.partition("/")[0] for name in names} == {"msense", "msense-0.1.0.dist-info"}
    with tarfile.open(sdist) as archive:
        check_contents([name.partition("/")[2] for name in archive.getnames()])
