"Shared by several tests: scratch projects, made-up records in them, and notebooks run cell by cell."

import contextlib
import shutil

import nbformat
import numpy as np
import pytest
from browser import CHROMIUM, Browser

from s5vh_nb.basics.config import BaselineConfig, to_dict
from s5vh_nb.basics.files import find_root, scratch_project
from s5vh_nb.evidence.identity import differences, find_value, method_name
from s5vh_nb.evidence.records import RunRecord
from s5vh_nb.evidence.runs import complete, history_arrays
from s5vh_nb.evidence.scoring import PROTOCOLS, score
from s5vh_nb.evidence.store import NO_TRAINING, Store

ROOT = find_root()
TERMS = ("loss", "reconstruction", "contrast", "alignment")
VIEWS = {"flat": ", flattened", "mean": ", time mean", "pair": ""}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium, which shows the page")
    with contextlib.closing(Browser(CHROMIUM, tmp_path_factory.mktemp("chromium"))) as browser:
        yield browser


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


@pytest.fixture
def store(checkout):
    "A store of profile smoke in the scratch project."
    return Store("tests", "smoke", root=checkout, device="cpu", progress=False)


@pytest.fixture
def keep(store):
    "A function that keeps a made-up record of a configuration: metrics, and perhaps arrays, columns, codes."

    def make(config, metrics, label="", *, arrays=None, columns=None, codes=None):
        data = store.data(config.dataset)
        record = RunRecord(
            config=differences(complete(config, data)),
            label=label,
            metrics=metrics,
            data={
                "name": data.name,
                "fingerprint": data.fingerprint,
                "train": len(data.train),
                "database": len(data.database),
            },
            device="none",
            seconds={"train": 1.0},
            artefact="tests",
            columns=columns or {},
        )
        return store.archive.save(record, arrays or {}, codes)

    return make


def made_up_codes(labels, bits, quality, rng):
    "A share of the items gets the code of its class, the others have random bits."
    words = np.random.default_rng(1).integers(0, 256, (64, bits // 8), np.uint8)
    first = labels if labels.ndim == 1 else labels.argmax(1)
    noise = rng.integers(0, 256, (len(first), bits // 8), np.uint8)
    return np.where(rng.random(len(first))[:, None] < quality, words[first], noise)


@pytest.fixture
def pretend(store, keep):
    "A function that keeps the record of a run that never was, with a share `quality` of right codes."

    def make(config, quality=0.0, evaluations=(0.1, 0.2)):
        data, rng = store.data(config.dataset), np.random.default_rng(config.seed)
        bits = find_value(to_dict(config), "bits")
        splits = {"query": data.query, "database": data.database}
        codes = {part: made_up_codes(split.labels, bits, quality, rng) for part, split in splits.items()}
        found = score(codes, data)
        cut = PROTOCOLS[data.kind].columns(len(data.database))
        history = [
            {"epoch": epoch, **dict.fromkeys(TERMS, 1.0), **dict.fromkeys(cut, value)}
            for epoch, value in enumerate(evaluations)
        ]
        history = history or [{"epoch": epoch, **dict.fromkeys(TERMS, 1.0)} for epoch in (0, 1)]
        fitted = isinstance(config, BaselineConfig)
        row = config.method.upper() + VIEWS[config.view] if fitted else method_name(config)
        arrays, columns = history_arrays([] if fitted else history)
        kept = dict(arrays=arrays | found.arrays, columns=columns | found.columns, codes=codes)
        return keep(config, {"row": row, **found.metrics}, **kept)

    return make


@pytest.fixture
def cells(checkout, monkeypatch):
    "A function that runs a notebook's cells in smoke, where no run may be made; returns their variables."
    for given in ("published", "earlier"):
        shutil.copytree(ROOT / "results" / given, checkout / "results" / given)
    monkeypatch.setenv(NO_TRAINING, "1")
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(name, **given):
        space = {}
        for cell in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, space)
            if "parameters" in cell.metadata.get("tags", []):
                space.update(profile="smoke", device="cpu", **given)
        return space

    return run
