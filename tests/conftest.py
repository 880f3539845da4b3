"Shared by several tests: scratch projects that results are written to."

import shutil

import pytest

from s5vh_nb.basics.files import find_root, scratch_project

ROOT = find_root()


@pytest.fixture
def checkout():
    "The folder of an empty checkout, which is the working directory during the test."
    with scratch_project() as root:
        yield root


@pytest.fixture
def project(checkout, tmp_path, monkeypatch):
    "A function of the parts to copy and the code that kernels start with; returns the scratch project."

    def make(parts, startup):
        for part in parts:
            (checkout / part).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, checkout / part)
        folder = tmp_path / "ipython" / "profile_default" / "startup"
        folder.mkdir(parents=True)
        (folder / "small.py").write_text(startup, encoding="utf-8")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        return checkout

    return make
