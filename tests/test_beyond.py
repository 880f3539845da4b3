"The answers of the notebooks beyond the papers, on made-up records."

import pytest

from s5vh_nb.evidence.experiments import PLUS
from s5vh_nb.evidence.study import open_study


@pytest.fixture
def answer(checkout, pretend, cells, capsys):
    "A function of a notebook and the quality of its rows: what it prints, and the names of its files."

    def make(name, quality, of_pairs=None):
        for experiment, rows in {name: quality, f"{name}/pairs": of_pairs or {}}.items():
            if rows:
                study = open_study(
                    f"beyond/{experiment}", "smoke", device="cpu", root=checkout, may_train=False
                )
                for (*_, row), configs in study.cells(list(rows)).items():
                    for config in configs:
                        pretend(config, rows[row])
        cells(f"beyond/{name}")
        files = {path.name for path in checkout.rglob("*") if path.suffix in (".csv", ".png")}
        return capsys.readouterr().out, files

    return make


@pytest.mark.parametrize("better", [True, False])
def test_plus_and_its_parts(answer, better):
    quality = {PLUS: 0.6, "without layers": 0.9 if better else 0.2, "ITQ, flattened": 0.3}
    said, files = answer("plus", quality, {PLUS: 0.9 if better else 0.3, "ITQ": 0.6, "text counts once": 0.1})
    assert f"With one part changed Plus is worse in {int(not better)} of 1 comparisons" in said
    row = "'without layers' on spoken-digits (16 bits)" if better else "none"
    assert f"Better than Plus is {row}." in said
    assert f"Plus is better than ITQ in {int(better)} of 1, than CCA-ITQ in 0 of 0" in said
    assert {"beyond_plus.csv", "plus_gains.png", "beyond_plus_pairs.csv", "plus_pair_gains.png"} <= files


def test_plus_without_records(answer):
    said, files = answer("plus", {"ITQ, flattened": 0.3}, {"ITQ": 0.3})
    assert "Plus has no records in profile smoke yet." in said and "beyond_plus.csv" not in files
    assert "On image-text pairs Plus has no records" in said and "beyond_plus_pairs.csv" not in files


def test_where_curves_flatten(answer):
    said, files = answer("bits", {"S5VH": 0.5, "ITQ, flattened": 0.5})
    assert "S5VH: " in said and "no records" not in said
    assert {"beyond_bits.csv", "beyond_bits_stops.csv", "bits.png"} <= files


@pytest.mark.parametrize("rows", [2, 1, 0])
def test_numbers_of_centers(answer, rows):
    counted = dict(list({"5 centers": 0.9, "20 centers": 0.6}.items())[:rows])
    said, files = answer("sensitivity", {"no alignment": 0.3, **counted})
    assert ("with several numbers of centers has no records in profile smoke yet" in said) == (rows < 2)
    assert ("sensitivity_c.png" in files) == (rows == 2)
    if rows == 2:
        assert "Alignment is better in 2 and worse in 0 of 2 comparisons with none" in said
