"The look of figures: colours that a deuteranope tells apart, seen against white; rows that meet differ."

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from s5vh_nb.evidence.experiments import EXPERIMENTS
from s5vh_nb.evidence.report import (
    COLOURS,
    VERDICTS,
    draw_intervals,
    label_lines,
    log_ticks,
    look,
    shades,
    shared_legend,
    style,
)

# Machado, Oliveira and Fernandes (2009), table 1: severity 1.0, on linear RGB
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
# IEC 61966-2-1 (sRGB, white D65)
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
BITS = [16, 32, 64, 128]
APART = 20  # CIE76


def linear(colour):
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def cielab(rgb):
    "Of linear RGB."
    xyz = TO_XYZ @ rgb / (TO_XYZ @ np.ones(3))
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(a, b):
    "CIE76, as a deuteranope sees it."
    seen = [cielab(np.clip(DEUTERANOPIA @ linear(colour), 0, 1)) for colour in (a, b)]
    return np.linalg.norm(seen[0] - seen[1])


def contrast(colour):
    "On white (WCAG 2)."
    return 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05)


def seen(row):
    "What tells a row from others that meet it."
    at = look(row)
    return tuple(at["color"]), at["marker"], at["ls"], "mfc" in at


def colours_of(values):
    return [each["color"] for each in values]


def test_the_simulation_is_one_of_deuteranopia():
    "Greys stay, red and green that differ only in what is not seen come close."
    assert np.allclose(DEUTERANOPIA.sum(1), 1, atol=1e-4)
    assert difference("#d55e00", "#7f9b00") < 0.5 * np.linalg.norm(
        cielab(linear("#d55e00")) - cielab(linear("#7f9b00"))
    )
    assert difference("#000000", "#ffffff") == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(
    "colours",
    [
        list(COLOURS.values()),
        list(VERDICTS.values()),
        colours_of(look(f"{k} bits") for k in BITS),
        colours_of(shades("abcd").values()),
    ],
    ids=["methods", "verdicts", "code lengths", "ordered"],
)
def test_colours_are_told_apart(colours):
    assert min(map(contrast, colours)) >= 3
    assert min(difference(*pair) for pair in itertools.combinations(colours, 2)) >= APART


@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if experiment.rows])
def test_neighbours_are_told_apart(name):
    "Rows next to each other share a colour or differ in it clearly."
    rows = list(EXPERIMENTS[name].rows)
    for pair in itertools.pairwise(rows):
        a, b = (look(row)["color"] for row in pair)
        assert tuple(a) == tuple(b) or difference(a, b) >= APART, pair


MEET = {  # figures of curves and their rows; others show a row on a line of its own, with its name
    "retrieval": list(EXPERIMENTS["s5vh/retrieval"].rows),
    "losses": list(EXPERIMENTS["s5vh/losses"].rows),
    "centers": list(EXPERIMENTS["s5vh/centers"].rows),
    "temporal": list(EXPERIMENTS["s5vh/temporal"].rows),
    "convergence": list(EXPERIMENTS["s5vh/convergence"].rows),
    "schedule/epochs": list(EXPERIMENTS["s5vh/schedule/epochs"].rows),
    "gain": list(EXPERIMENTS["s5vh/gain"].rows),
    "schedule": [row for row in EXPERIMENTS["s5vh/schedule"].rows if row.count(",") == 1],
    "scale": list(EXPERIMENTS["beyond/scale"].rows),
    "bits": list(EXPERIMENTS["beyond/bits"].rows),
    "long": list(EXPERIMENTS["beyond/long"].rows),
    "copies": list(EXPERIMENTS["beyond/copies"].rows),
    "table2": list(EXPERIMENTS["dmmh/table2"].rows),
    "speed": list(EXPERIMENTS["dmmh/speed"].rows),
    "efficiency": ["S5VH", "Transformer", "LSTM", "RetNet", "RWKV", "Mamba-2"],
}


@pytest.mark.parametrize("figure", MEET)
def test_rows_that_meet_look_different(figure):
    looks = [seen(row) for row in MEET[figure]]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("figure", ["bits", "copies", "efficiency", "speed"])
def test_methods_that_carry_the_story_have_colours_of_their_own(figure):
    names = {row.partition(",")[0] for row in MEET[figure]} - {"without Mamba"}
    colours = {look(name)["color"] for name in names}
    assert len(colours) == len(names)


def test_a_method_looks_alike_everywhere():
    assert look("S5VH, with stochastic depth, 0.25 of the clips") == look("S5VH")
    assert look("LSTM, both") == look("SSTH-style")
    assert look("ConMH")["color"] == look("ConMH-style")["color"] and look("ConMH")["mfc"] == "w"
    assert look("someone's method") == look("someone's method")


@pytest.fixture
def axes():
    style()
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def test_labels_at_lines_do_not_overlap(axes):
    heights = {"S5VH": 0.5, "Plus": 0.505, "ITQ": 0.51, "LSH": 0.0, "BTH": 1.0}
    for row, height in heights.items():
        axes.plot([16, 64], [0, height], label=row, **look(row))
    label_lines(axes)
    axes.figure.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without leaders
    assert boxes.keys() == heights.keys()
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
    middle = {row: (box.y0 + box.y1) / 2 for row, box in boxes.items()}
    assert sorted(middle, key=middle.get) == sorted(heights, key=heights.get)


@pytest.mark.parametrize("sideways", [False, True])
def test_intervals_reach_from_end_to_end(axes, sideways):
    spans = [(0.2, 0.1, 0.4), (0.5, np.nan, np.nan)]  # one seed has no interval
    draw_intervals(axes, [1, 2], spans, sideways=sideways, label="S5VH", **look("S5VH"))
    (bars,) = axes.containers[0][2]
    ends = np.array(bars.get_segments()[0])[:, 0 if sideways else 1]
    assert ends == pytest.approx([0.1, 0.4])


def test_a_band_and_its_line_share_a_colour(axes):
    draw_intervals(axes, [1, 2], [(0.2, 0.1, 0.4)] * 2, band=True, **look("Plus"))
    assert to_rgb(axes.collections[0].get_facecolor()[0][:3]) == to_rgb(axes.lines[0].get_color())


def test_panels_share_a_legend(axes):
    axes.plot([1, 2], [1, 2], label="S5VH")
    axes.twinx().plot([1, 2], [2, 1], label="S5VH")
    axes.figure.supxlabel("bits")
    shared_legend(axes.figure)
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["S5VH"]
    axes.figure.draw_without_rendering()
    assert legend.get_window_extent().y0 > axes.get_window_extent().y1  # clear of the label below


def test_ticks_are_where_the_measurements_are(axes):
    axes.plot([16, 32, 64], [1, 2, 3])
    log_ticks(axes, [16, 32, 64])
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "32", "64"]
