"Shared by the tests of profile paper: a scratch project whose kernels start with a small configuration."
import shutil

import pytest

from s5vh_nb.basics import project_root


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A function of the parts to copy and the code that its kernels start with; returns the project's folder and makes it the home."
    def make(parts, startup):
        home, folder = tmp_path/"home", tmp_path/"ipython"/"profile_default"/"startup"
        for part in parts:
            (home/part).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (project_root()/part).is_dir() else shutil.copy)(project_root()/part, home/part)
        folder.mkdir(parents=True)
        (folder/"small.py").write_text(startup)
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path/"ipython"))
        monkeypatch.setenv("S5VH_NB_HOME", str(home))
        return home
    return make
