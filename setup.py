"""Puts what a reader needs beside the code into the package: one file, `s5vh_nb/notebooks.zip`.

It holds the notebooks, and the records, tables and figures that they read; `s5vh-nb notebooks FOLDER` unpacks
it. All else is in pyproject.toml. An editable installation has the checkout and gets no such file.
"""

import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PARTS = """CITATION.cff LICENSE LOG.md README.md nbs figures/drawings figures/full results/earlier
    results/expected results/expected.csv results/full results/published settings.ini""".split()
# settings.ini comes last: it marks a folder that is whole


def is_left_over(path: Path) -> bool:
    "Whether a tool made it: a hidden file or folder, the records of runs under way, an unfinished file."
    return "runs" in path.parts or ".tmp-" in path.name or any(name.startswith(".") for name in path.parts)


def readers_files() -> list:
    "Their paths below the project's folder, which is the working directory of a build."
    found = []
    for part in map(Path, PARTS):
        if not part.exists():
            raise FileNotFoundError(f"{part.absolute()}: expected a part of the project, found nothing")
        below = sorted(part.rglob("*")) if part.is_dir() else [part]
        found += [path for path in below if path.is_file() and not is_left_over(path)]
    return [path.as_posix() for path in found]


class BuildWithNotebooks(build_py):
    "The package, with its notebooks unless it is installed in editable mode."

    def get_source_files(self):
        "Also what a source distribution must have."
        return super().get_source_files() + readers_files()

    def run(self):
        super().run()
        if self.editable_mode:
            return
        with zipfile.ZipFile(Path(self.build_lib, "s5vh_nb", "notebooks.zip"), "w") as file:
            for path in readers_files():
                # without clock times, so that equal files make an equal wheel
                file.writestr(zipfile.ZipInfo(path), Path(path).read_bytes(), zipfile.ZIP_DEFLATED)


setup(cmdclass={"build_py": BuildWithNotebooks})
