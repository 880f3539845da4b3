"Costs of encoding: the tools on known quantities, a measurement that stops and goes on, made-up records."

import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

from s5vh_nb.basics.profiles import train_config
from s5vh_nb.evidence import measurements
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.experiments import efficiency_config
from s5vh_nb.evidence.measurements import (
    cost_by_frames,
    cost_points,
    cost_ratio,
    cost_record,
    encoding_costs,
    growths,
    long_video_costs,
)
from s5vh_nb.evidence.records import RunRecord
from s5vh_nb.measure.efficiency import crossover, energy_meter, growth, local_growth, peak_bytes, repeated
from s5vh_nb.models.mixers import MIXERS

CPU = torch.device("cpu")
FRAMES = np.array([400, 1000, 2000, 4000, 8000])
SMOKE, HOURS = (efficiency_config("smoke", 16, 1, kind) for kind in ("efficiency", "long-videos"))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(mixer="Mamba"):
    return train_config(profile="smoke", bits=16, d=SMOKE["d"], mixer=mixer).model


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_interval_of_growth_covers_the_exponent(exponent):
    rng = np.random.default_rng(0)
    for _ in range(100):
        times = FRAMES[:, None] ** exponent * np.exp(0.02 * rng.standard_normal((5, 12)))
        p, low, high = growth(FRAMES, np.quantile(times, (0.5, 0.25, 0.75), axis=1).T)
        assert low <= exponent <= high and high - low < 0.3 and abs(p - exponent) < 0.02


def test_the_interval_of_growth_shows_a_bend():
    "Linear up to 2000 frames and quadratic beyond: one power fits neither part."
    bent = np.where(FRAMES <= 2000, FRAMES, FRAMES**2 / 2000)
    assert np.allclose(local_growth(FRAMES, bent)[:, 0], [1, 1, 2, 2])
    p, low, high = growth(FRAMES, bent)
    assert np.allclose([low, high], [1, 2]) and 1 < p < 2


def test_crossover_asks_for_quartiles_that_are_apart():
    ours, theirs = np.array([5.0, 5, 5, 5, 5]), np.array([4.0, 6, 5, 6, 7])
    assert crossover(FRAMES, ours, theirs) == 4000  # below at 1000 as well, but not at 2000
    wide = np.stack([ours, ours - 1, ours + 1.5], 1)
    assert crossover(FRAMES, wide, theirs) == 8000
    assert crossover(FRAMES, ours, ours) is None and crossover([], [], []) is None


def test_repeats_fill_the_window():
    seen = []
    many = repeated(lambda: seen.append(torch.zeros(100).sum()), CPU, least=5, window=0.02)
    assert len(many.seconds) > 5 and many.joules is None
    assert len(seen) == len(many.seconds) + 4  # and two calls each for two estimates


@pytest.fixture
def counter(monkeypatch):
    "A GPU whose counter of millijoules stands in a dictionary."

    class NVMLError(Exception):
        pass

    def read(handle):
        if handle != "GPU-1234":
            raise NVMLError("not supported")
        return state["mJ"]

    state = {"mJ": 5000, "uuid": "1234"}
    functions = dict(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid)
    fake = types.SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetTotalEnergyConsumption=read, **functions)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid=state["uuid"])
    )
    return state


def test_energy_is_that_of_the_device_in_joules(counter):
    meter = energy_meter(torch.device("cuda"))
    before = meter()
    counter["mJ"] += 2500
    assert meter() - before == 2.5
    assert energy_meter(CPU) is None
    counter["uuid"] = "a part of a GPU"
    assert energy_meter(torch.device("cuda")) is None


def test_energy_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    assert energy_meter(torch.device("cuda")) is None


def test_a_cell_without_memory_ends_its_row_and_the_larger_ones(monkeypatch):
    monkeypatch.setattr(measurements, "peak_bytes", short_of_memory(at=16))
    points = encoding_costs(network(), SMOKE | dict(batches=(1, 2, 4), frames=(8, 16, 32)), CPU)["points"]
    failed = {(p["batch"], p["t"]): p.get("failed") for p in points}
    assert failed[1, 16] == "out of memory"
    assert {place for place, why in failed.items() if why is None} == {(b, 8) for b in (1, 2, 4)}
    assert [failed[place] for place in ((1, 32), (2, 16), (4, 32))] == ["not tried"] * 3


def short_of_memory(at):
    "`peak_bytes` on a machine that has no room for so many frames."

    def measure(call, device, calls):
        frames = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, torch.Tensor))
        if frames.shape[1] >= at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return peak_bytes(call, device, calls)

    return measure


def test_slow_cells_are_foreseen():
    points = encoding_costs(network(), SMOKE | dict(frames=(8, 10**9)), CPU)["points"]
    assert [p.get("failed") for p in points] == [None, "too slow", None, "not tried"]


def test_an_error_that_is_no_refusal_is_not_kept():
    with pytest.raises(ValueError, match="frames: expected shape"):
        encoding_costs(network(), SMOKE | dict(frames=(0,)), CPU)


def test_a_stopped_measurement_goes_on(store):
    "One record per layer: what was measured before the stop is not measured again."
    asked = []

    def measure(mixer):
        asked.append(mixer)
        if asked == ["Mamba", "LSTM"]:
            raise KeyboardInterrupt
        return {"points": [{"batch": 1, "t": 8, "seconds": 1.0}], "precision": "float32"}

    def all_of_them():
        return [cost_record(store, SMOKE, mixer, lambda: measure(mixer)) for mixer in ("Mamba", "LSTM")]

    with pytest.raises(KeyboardInterrupt):
        all_of_them()
    assert [record.label for record in all_of_them()] == ["Mamba", "LSTM"]
    assert asked == ["Mamba", "LSTM", "LSTM"]
    assert cost_points(store.archive, SMOKE).mixer.tolist() == ["Mamba", "LSTM"]


def test_streams_need_no_more_memory_for_longer_videos():
    longer = HOURS | dict(frames=(100, 2000), piece=50, ahead=10)
    points = pd.DataFrame(long_video_costs(network(), longer, CPU)["points"])
    peak = points.pivot(index="t", columns="way", values="peak_bytes")
    assert (peak.loc[2000] / peak.loc[100]).round(1).to_dict() == {
        "at once": pytest.approx(20, rel=0.2),
        "stream": 1.0,
        "stream, forward network": 1.0,
    }


def made_up(archive, bend=1.0):
    "Records in which S5VH is linear, and the Transformer quadratic in time: equal where t is 8 / bend."
    for mixer in MIXERS:
        points = []
        for b, t in [(b, t) for b in SMOKE["batches"] for t in SMOKE["frames"]]:
            seconds = 1e-3 * b * t * (bend * t / 8 if mixer == "Transformer" else 1.0)
            ends = {"seconds_low": 0.99 * seconds, "seconds_high": 1.01 * seconds}
            size = 1000 * b * t * (2 if mixer == "Transformer" else 1)
            cell = {"batch": b, "t": t, "seconds": seconds, **ends, "calls": 10, "eager": 2 * seconds}
            points.append(cell | {"peak_bytes": size, "joules": 100 * seconds})
        common = dict(data={}, device="A GPU", seconds={"measure": 1.0}, artefact="tests")
        archive.save(RunRecord(SMOKE, {"points": points, "precision": "bfloat16"}, label=mixer, **common), {})


@pytest.mark.parametrize("bend, place", [(1.0, "at t = 16"), (0.25, "nowhere"), (4.0, "at t = 4, 8, 16")])
def test_the_answer_says_where(checkout, cells, capsys, bend, place):
    made_up(Archive(checkout, "smoke"), bend)
    cells("s5vh/efficiency")
    said = capsys.readouterr().out
    for word, where in (("faster", place), ("smaller", "at t = 4, 8, 16")):
        lines = [f"- {b} at a time: {where} (measured up to 16)" for b in (1, 2)]
        assert "\n".join([f"S5VH is {word} than the Transformer:", *lines]) in said
    assert "Time grows: t^1.00 to t^1.00 (S5VH), t^2.00 to t^2.00 (Transformer), the gap grows in 2" in said
    assert "the gap grows in 0 and shrinks in 0 of 2 ranges" in said  # in memory
    assert "not run yet: long videos\n" in said and "A video of" not in said
    assert {path.name for path in checkout.rglob("*.png")} == {
        "efficiency_time.png",
        "efficiency_crossover.png",
    }


def test_nothing_was_measured(checkout, cells, capsys):
    cells("s5vh/efficiency")
    assert "not run yet" in capsys.readouterr().out
    assert not list(checkout.rglob("*.png")) and not list((checkout / "results").rglob("s5vh_efficiency*"))


def test_claims_on_growth(checkout, cells):
    made_up(Archive(checkout, "smoke"))
    table = cells("s5vh/claims")["table"].set_index("claim")
    of = table[table.notebook == "s5vh/efficiency"]
    assert of.verdict.to_dict() == {
        "time grows at most linearly with t": "holds",
        "the gap to a Transformer in time grows": "holds",
        "memory grows at most linearly with t": "holds",
        "the gap to a Transformer in memory grows": "does not hold",
        "memory stays low with a large state": "not testable here",
    }
    assert set(of.hold.iloc[:3]) == {"2 of 2"}  # a batch each, in the paper's range


def test_growth_needs_three_lengths(checkout):
    archive = Archive(checkout, "smoke")
    assert cost_points(archive, SMOKE).empty
    made_up(archive)
    ours = cost_by_frames(cost_points(archive, SMOKE), "Mamba", 2, "time")
    assert list(growths(ours, 200)) == ["t up to 200"] and growths(ours.iloc[:2], 200) == {}
    assert cost_ratio(ours.iloc[1:], ours)["median"].tolist() == [1, 1]


@on_gpu
def test_a_replay_takes_what_the_gpu_needs():
    x = torch.randn(4096, 4096, device="cuda")
    seconds, joules = repeated(lambda: x @ x, x.device)
    assert 2 * 4096**3 / 2e15 < np.median(seconds) < 0.1 and seconds.min() > 0.5 * np.median(seconds)
    assert joules is None or 1e-3 < joules / np.median(seconds) < 2000  # watts
    assert peak_bytes(lambda: x @ x, x.device, calls=1) == pytest.approx(4 * 4096**2, rel=0.01)


@on_gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_layer_can_be_captured(mixer):
    points = encoding_costs(network(mixer), SMOKE, torch.device("cuda"))["points"]
    assert not [point for point in points if "failed" in point]
