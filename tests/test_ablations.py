"Ablations: every row of every experiment is a run of its own, and rows learn and change what they say."

import math

import pytest
import torch

from s5vh_nb.basics.config import VARIANTS, replace
from s5vh_nb.basics.profiles import PROFILES, train_config
from s5vh_nb.datasets.catalog import is_there, load
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.evidence.experiments import EXPERIMENTS, SHARES, SIZED, Experiment, config_of, share_row
from s5vh_nb.evidence.identity import run_name
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.training import fit_objective, train, training_share

LAYERS = {
    "Mamba, both": {},
    "Mamba, tied": dict(tied=True),
    "Mamba, backward": dict(directions="backward"),
    **{name: dict(mixer=name) for name in ("LSTM", "RetNet", "RWKV")},
    "Transformer": dict(mixer="Transformer", directions="forward"),
}
TERMS = {"reconstruction": "reconstruction", "alpha": "contrast", "beta": "alignment"}  # weight -> term
OFFICIAL = {"videos": ("ucf101",), "pairs": ("mirflickr25k",)}  # a set of the papers by kind of items


# Rows


def rows_of(experiment, profile):
    "Name -> configurations of every row at every place of a profile."
    datasets = experiment.datasets.get(profile, OFFICIAL[experiment.kind])
    places = [(dataset, bits) for dataset in datasets for bits in experiment.bits[profile]]
    for name, row in experiment.rows_in(profile).items():
        yield name, [config_of(row, d, profile, bits, seed=1) for d, bits in places]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_is_a_run_of_its_own(name, profile):
    rows = dict(rows_of(EXPERIMENTS[name], profile))
    configs = [config for found in rows.values() for config in found if config is not None]
    assert len({run_name(config) for config in configs}) == len(configs)
    if EXPERIMENTS[name].base:
        assert None not in rows[EXPERIMENTS[name].base]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "paper"])
def test_a_variant_is_another_run(name):
    config = train_config("spoken-digits", "smoke")
    assert run_name(train_config("spoken-digits", "smoke", name)) != run_name(config)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dataset", EXPERIMENTS["s5vh/schedule"].datasets["full"])
def test_part_of_the_clips_has_the_steps_of_all(dataset, share):
    if not is_there(dataset):
        pytest.skip(f"{dataset} isn't here")
    data = load(dataset)

    def steps(row):
        "Of the warm-up, between two evaluations, and of the whole training."
        c = config_of(EXPERIMENTS["s5vh/schedule"].rows[row], dataset, "full", 64, 1)
        clips = len(training_share(data, c.share, c.seed).train)
        epochs = (c.objective.warmup, c.evaluate_every, c.epochs)
        return [n * math.ceil(clips / c.batch) for n in epochs]

    for network in SIZED:
        assert steps(share_row(network, share)) == pytest.approx(steps(network), rel=0.02)


def test_a_row_that_changes_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="did you mean 'beta'"):
        config_of(dict(bta=0.0), "spoken-digits", "smoke", 16, 1)


@pytest.mark.parametrize(
    "parts", [dict(base="b"), dict(without={"quick": ("b",)}), dict(longest_only={"full": "b"})]
)
def test_an_experiment_that_names_an_unknown_row_is_refused(parts):
    with pytest.raises(ValueError, match="row: expected one of a, found 'b'"):
        Experiment({"a": {}}, **parts)


# Learning


@pytest.fixture(scope="module")
def few():
    "64 recordings."
    data = load("spoken-digits")
    part = Split({"frames": data.train.frames[:64]}, data.train.labels[:64], "the first 64")
    return Dataset("spoken-digits", part, part, part, data.classes, data.origin)


def start(data, **changes):
    "A run before its first epoch."
    config = train_config("spoken-digits", "smoke", **changes)
    return new_run(replace(config, **data.widths), data, torch.device("cpu"))


def trained(data, profile="smoke", **changes):
    "Weights before and after a short training, and its history."
    options = {"epochs": 2, "n_centers": 4, "batch": 32, "evaluate_every": 0, **changes}
    config = train_config("spoken-digits", profile, **options)
    before = new_run(replace(config, **data.widths), data, torch.device("cpu")).model.state_dict()
    run = train(config, data, device="cpu", progress=False)
    return before, run.model.state_dict(), run.history


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)
def test_every_temporal_layer_learns(few, changes):
    "Of quick's size; in the released code three of these kept no weights from one pass to the next."
    before, after, history = trained(few, "quick", **changes)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("weight", TERMS)
def test_a_single_loss_is_alone(few, weight):
    before, after, history = trained(few, **{other: 0.0 for other in TERMS if other != weight})
    assert set(history[-1]) == {"epoch", "loss", TERMS[weight]}
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"encoder", "hash"} | ({"decoder"} if weight == "reconstruction" else set())


def test_centers_differ_as_the_rows_say(few):
    def centers(**changes):
        run = start(few, bits=64, n_centers=32, **changes)
        fit_objective(run, few, progress=False)
        return run.objective.centers

    found = [centers(centers=kind) for kind in ("semantic", "plain", "hadamard", "random")]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert not centers(beta=0.0).any()
