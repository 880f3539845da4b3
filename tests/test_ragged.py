"Videos of different lengths: a data set trains on each video's own frames, whatever the padding."

import dataclasses

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s5vh_nb.basics.config import replace
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.rows import HDF5Rows
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.datasets.video_files import write_official
from s5vh_nb.evidence.runs import encode_splits
from s5vh_nb.learning import objectives, training
from s5vh_nb.learning.losses import (
    center_alignment_loss,
    contrastive_loss,
    reconstruction_loss,
    refresh_labels,
)
from s5vh_nb.learning.objectives import SLGObjective
from s5vh_nb.models.methods import fit_baseline
from s5vh_nb.models.mixers import MIXERS
from s5vh_nb.models.s5vh import S5VH

N, D, LONGEST = 40, 5, 14
LENGTHS = np.random.default_rng(1).integers(3, LONGEST + 1, N)
LENGTHS[:2] = LONGEST, 3
DIRECTIONS = ("both", "forward", "backward")


def videos(extra=0, filling=0, lengths=LENGTHS):
    "A data set of random videos of these lengths, padded with `extra` frames more than needed."
    rng = np.random.default_rng(0)
    x = np.random.default_rng(filling).normal(size=(N, LONGEST + extra, D)).astype("float32")
    for video, length in zip(x, LENGTHS):
        video[:length] = rng.normal(size=(length, D)) + np.arange(length)[:, None] / LONGEST
    labels = np.arange(N) % 3
    train = Split({"frames": x}, labels, "toy", lengths=lengths)
    return Dataset("spoken-digits", train, train, train.take(slice(9)), ("a", "b", "c"), "made here")


def configuration(**changes):
    small = dict(bits=16, m=16, depth=2, decoder_m=16, n_centers=4, batch=16, epochs=3, warmup=1)
    return train_config("spoken-digits", "smoke", **{**small, **changes})


def train(config, data, **options):
    return training.train(config, data, device="cpu", progress=False, **options)


def same(run, other):
    return (
        run.history == other.history
        and torch.equal(run.weights, other.weights)
        and torch.equal(run.objective.soft_labels, other.objective.soft_labels)
    )


# The data set


def test_padding_reaches_neither_the_split_nor_its_fingerprint():
    plain, noisy = videos(), videos(7, 3)
    assert plain.train.frames.shape == noisy.train.frames.shape == (N, LONGEST, D)
    np.testing.assert_array_equal(plain.train.frames, noisy.train.frames)
    assert plain.fingerprint == noisy.fingerprint
    as_list = Split({"frames": [x[:t] for x, t in zip(plain.train.frames, LENGTHS)]}, None, "toy")
    np.testing.assert_array_equal(as_list.frames, plain.train.frames)
    np.testing.assert_array_equal(as_list.lengths, LENGTHS)


def test_videos_of_one_length_are_no_ragged_videos():
    "However it is said: the splits, and so fingerprints and runs, are those without lengths."
    x, labels = np.random.default_rng(0).normal(size=(N, 6, D)).astype("float32"), np.arange(N) % 3

    def made(frames, **options):
        train = Split({"frames": frames}, labels, "toy", **options)
        return Dataset("spoken-digits", train, train, train.take(slice(9)), ("a", "b", "c"), "made here")

    plain = made(x)
    wider = np.concatenate([x, x + 1], axis=1)
    for data in (made(x, lengths=[6] * N), made(list(x)), made(wider, lengths=np.full(N, 6, np.uint8))):
        assert data.train.lengths is None and data.fingerprint == plain.fingerprint
        assert same(train(configuration(), data), train(configuration(), plain))


def test_lengths_are_part_of_the_fingerprint():
    "Of two sets with the same numbers, where one counts frames of zeros that are padding in the other."
    data = videos()
    longer = LENGTHS.copy()
    longer[5] += 1 if longer[5] < LONGEST else -1
    other = dataclasses.replace(data.train, lengths=longer)
    changed = dataclasses.replace(data, train=other, database=other)
    assert changed.fingerprint != data.fingerprint


def test_ragged_videos_in_a_file(tmp_path, monkeypatch):
    "Read on demand and in batches, they are the same videos, whatever the file holds behind their ends."
    data, noisy = videos(), np.random.default_rng(5).normal(size=(N, LONGEST + 4, D)).astype("float32")
    for video, x, t in zip(noisy, data.train.frames, LENGTHS):
        video[:t] = x[:t]
    with h5py.File(tmp_path / "videos.h5", "w") as f:
        f["feats"] = noisy
    split = Split({"frames": HDF5Rows(tmp_path / "videos.h5")}, data.train.labels, "toy", lengths=LENGTHS)
    np.testing.assert_array_equal(split.frames[:], data.train.frames)
    np.testing.assert_array_equal(split.take([3, 1]).frames[:], data.train.take([3, 1]).frames)
    np.testing.assert_array_equal(split.probe, data.train.probe)
    lazy = dataclasses.replace(data, train=split, database=split)
    assert lazy.fingerprint == data.fingerprint
    expected = train(configuration(), data)
    assert same(train(configuration(), lazy), expected)
    monkeypatch.setattr(training, "free_memory", lambda device: 100)
    monkeypatch.setattr(training, "to_tensor", None)
    assert same(train(configuration(), lazy), expected)
    for view in ("mean", "flat"):
        codes = [
            fit_baseline("itq", part, 4, view).encode(part.frames, lengths=LENGTHS)
            for part in (split, data.train)
        ]
        np.testing.assert_array_equal(*codes)


def test_splits_of_other_lengths_and_widths():
    data = videos()
    short = data.train.take(LENGTHS < 6)
    assert dataclasses.replace(data, query=short).query.frames.shape[1] == 5
    one = data.train.take([0])
    assert one.lengths is None and dataclasses.replace(data, query=one).query is one
    narrow = Split({"frames": short.frames[..., 1:]}, short.labels, "narrow", lengths=short.lengths)
    with pytest.raises(ValueError, match=r"narrow: shape of frames: expected \(5,\) as in toy, found \(4,\)"):
        dataclasses.replace(data, query=narrow)


def test_lengths_that_files_or_pairs_do_not_have(tmp_path):
    with pytest.raises(ValueError, match="ucf101: train: expected videos of one length"):
        write_official(tmp_path, "ucf101", videos())
    pairs = {"image": np.ones((4, 2), np.float32), "text": np.ones((4, 2), np.float32)}
    with pytest.raises(ValueError, match="toy: lengths: expected None for pairs, found list"):
        Split(pairs, None, "toy", lengths=[1, 1, 1, 1])


# Training


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_ragged_set_trains_the_same_with_any_padding(mixer):
    "Losses, weights and codes, bit for bit."
    config = configuration(mixer=mixer)
    run, padded = train(config, videos()), train(config, videos(7, 3))
    assert same(run, padded)
    codes = encode_splits(run.model, videos()), encode_splits(padded.model, videos(7, 4))
    for name in ("query", "database"):
        np.testing.assert_array_equal(codes[0][name], codes[1][name])


def batch(data, config, double=True):
    "A network, an objective whose labels have moved, and the first batch of an epoch."
    torch.manual_seed(0)
    model, objective = S5VH(replace(config, **data.widths).model), SLGObjective(config, len(data.train))
    objective.fit(model, data, progress=False)
    x = torch.from_numpy(data.train.frames)
    plan = training._plan_epoch(N, LONGEST, 16, 1, 0, lengths=torch.from_numpy(LENGTHS))
    rows, order, lengths = plan.draws[0]
    if double:
        model, objective, x = model.double(), objective.double(), x.double()
    return model, objective, x[rows], rows, order, lengths


def by_hand(model, objective, x, rows, order, lengths, past_warmup):
    "The loss of a batch, video by video and without padding."
    c, codes, wrong = objective.c, ([], []), 0
    for video, own, t, row in zip(x, order, lengths.tolist(), rows.tolist()):
        video, own, hidden = video[None, :t], own[:t], int(c.mask_ratio * t)
        assert sorted(own.tolist()) == list(range(t))
        if past_warmup:
            with torch.no_grad():
                h = model(video, normed=c.refresh_with_norm).h
            logits = objective.logits(h)
            moved = refresh_labels(objective.soft_labels[[row]], logits, c.refresh)
            objective.soft_labels[row] = moved[0]
        for view, frames in enumerate((own[: t - hidden], own[hidden:])):
            visible = frames.sort().values[None]
            out = model(video, visible)
            codes[view].append(out.h)
            rebuilt = model.decoder(out.codes, visible, out.hidden)
            assert out.hidden.shape == (1, hidden)
            wrong += F.mse_loss(rebuilt[0], video[0, out.hidden[0]]) / len(x)
    views = [torch.cat(view) for view in codes]
    contrast = contrastive_loss(*views, c.tau_plus, c.temperature)
    aligned = center_alignment_loss(objective.logits(torch.cat(views)), objective.soft_labels[rows])
    return {
        "loss": c.reconstruction * wrong + c.alpha * contrast + c.beta * aligned,
        "reconstruction": wrong,
        "contrast": contrast,
        "alignment": aligned,
    }


def as_a_batch(model, objective, *parts, past_warmup):
    return objective(model, *parts, past_warmup=past_warmup)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("mask_ratio, past_warmup", [(0.5, True), (0.34, False)])
def test_the_loss_of_a_batch_is_that_of_its_videos(mixer, directions, mask_ratio, past_warmup):
    "With its gradients and the labels that it moves, computed video by video, without padding."
    config = configuration(
        mixer=mixer, directions=directions, mask_ratio=mask_ratio, alpha=0.7, drop_path=0.0
    )
    results = []
    for compute in (by_hand, as_a_batch):
        model, objective, *parts = batch(videos(), config)
        # a code of +-1 may jump with the last digit of its number; tanh shows every difference
        model.hash.relaxation = "tanh"
        terms = compute(model, objective, *parts, past_warmup=past_warmup)
        terms["loss"].backward()
        results.append((terms, [p.grad for p in model.parameters()], objective.soft_labels))
    (mine, grads, labels), (theirs, other_grads, other_labels) = results
    assert set(mine) == set(theirs)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(labels, other_labels, rtol=1e-10, atol=1e-10)
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)
    assert any(grad.abs().max() > 1e-4 for grad in grads)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_batch_does_not_depend_on_its_padding(mixer):
    "Seven more frames of noise behind every end: loss, gradients and labels stay."
    results = []
    for extra in (0, 7):
        torch.manual_seed(0)
        model, objective, x, rows, order, lengths = batch(videos(), configuration(mixer=mixer, drop_path=0.0))
        model.hash.relaxation = "tanh"
        x = torch.cat([x, torch.zeros(len(x), extra, D)], 1)
        after = torch.arange(x.shape[1]) >= lengths[:, None]
        x[after] = torch.randn(int(after.sum()), D).double() * extra
        order = torch.cat([order, (LONGEST + torch.arange(extra)).expand(len(x), -1)], 1)
        loss = objective(model, x, rows, order, lengths, past_warmup=True)["loss"]
        loss.backward()
        h = model.eval()(x, lengths=lengths).h
        results.append(
            [loss.detach(), h.detach(), objective.soft_labels, *(p.grad for p in model.parameters())]
        )
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_whole_videos_train_as_if_there_were_no_lengths(monkeypatch):
    "Bit for bit as with plan and objective written for whole videos only."

    def plan_of_whole_videos(n, t, batch, seed, epoch, device, lengths):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        rows = torch.randperm(n, generator=generator)
        steps = -(-n // batch)
        rows = torch.cat([rows, rows[: steps * batch - n]]).view(steps, batch)
        order = torch.rand(steps, batch, t, generator=generator).argsort(-1)
        return training._EpochPlan(rows, order, None)

    def loss_of_whole_videos(self, model, x, rows, order, past_warmup):
        t, c = order.shape[1], self.c
        v = t - int(c.mask_ratio * t)
        visible = torch.cat([order[:, :v], order[:, t - v :]]).sort(1).values
        if past_warmup:
            with torch.no_grad():
                logits = self.logits(model(x, normed=c.refresh_with_norm).h)
                moved = refresh_labels(self.soft_labels[rows], logits, c.refresh)
                self.soft_labels[rows] = moved
        out = model(x, visible)
        contrast = contrastive_loss(*out.h.chunk(2), c.tau_plus, c.temperature)
        alignment = center_alignment_loss(self.logits(out.h), self.soft_labels[rows])
        wrong = reconstruction_loss(model.decoder(out.codes, visible, out.hidden), x, out.hidden)
        loss = c.reconstruction * wrong + c.alpha * contrast + c.beta * alignment
        return {"loss": loss, "reconstruction": wrong, "contrast": contrast, "alignment": alignment}

    data = videos(lengths=None)
    assert data.train.lengths is None
    run = train(configuration(), data)
    monkeypatch.setattr(training, "_plan_epoch", plan_of_whole_videos)
    monkeypatch.setattr(objectives.SLGObjective, "forward", loss_of_whole_videos)
    assert same(train(configuration(), data), run)


def test_a_ragged_run_is_resumed(tmp_path):
    "From its first epoch, and with a share of its training videos; the rest of the set stays."
    data, config, path = videos(), configuration(share=0.6), tmp_path / "run.pt"
    whole = train(config, data)
    epoch, done = training.train_epoch, []

    def stops(*args):
        if done:
            raise KeyboardInterrupt
        done.append(epoch(*args))
        return done[0]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_epoch", stops)
        train(config, data, checkpoint=path, every=1)
    assert same(train(config, videos(7, 3), checkpoint=path, every=1, resume=True), whole)
    other = videos(lengths=np.maximum(LENGTHS - 1, 3))
    with pytest.raises(ValueError, match="a checkpoint trained on data with fingerprint"):
        train(config, other, checkpoint=path, resume=True)


def test_all_batches_have_one_shape():
    "So a step can be captured as a CUDA graph."
    plan = training._plan_epoch(N, LONGEST, 16, 1, 0, lengths=torch.from_numpy(LENGTHS))
    shapes = {tuple(tuple(x.shape) for x in draw) for draw in plan.draws}
    assert shapes == {((16,), (16, LONGEST), (16,))}
    for ratio in (0.3, 0.5, 0.8):
        counts = objectives._view_counts(plan.lengths[0], ratio)
        views = objectives.two_views(plan.order[0], ratio, counts)
        assert (
            views.shape == (32, LONGEST - int(ratio * LONGEST))
            and (views < plan.lengths[0].repeat(2)[:, None]).all()
        )


def test_a_video_too_short_to_hide_a_frame_is_named():
    lengths = LENGTHS.copy()
    lengths[7] = 1
    message = "at least one of the 1 frames of the shortest training video, number 7, found 0.5"
    with pytest.raises(ValueError, match=message):
        train(configuration(mask_ratio=0.5), videos(lengths=lengths))


# Evaluation and baselines


def test_codes_of_a_data_set_are_those_of_each_video_alone():
    "While it is trained, too: the evaluation passes lengths on."
    data, seen = videos(3, 1), []

    def evaluate(run):
        found = encode_splits(run.model, data)
        for split, codes in ((data.query, found["query"]), (data.database, found["database"])):
            alone = [run.model.encode(split.frames[[i], :t]) for i, t in enumerate(split.lengths)]
            seen.append(np.array_equal(codes, torch.cat(alone)))

    train(configuration(evaluate_every=3), data, evaluate=evaluate)
    assert seen and all(seen)


@pytest.mark.parametrize("method", ["itq", "lsh"])
def test_baselines_of_own_frames(method):
    "Means over own frames; flattened, zeros after the end and nothing beyond the longest training video."
    data = videos(7, 3)
    x, lengths = data.train.frames, data.train.lengths
    means = np.stack([video[:t].mean(0) for video, t in zip(x, lengths)])
    noisy = np.random.default_rng(8).normal(size=(N, LONGEST + 5, D)).astype("float32")
    for video, own, t in zip(noisy, x, lengths):
        video[:t] = own[:t]
    for view, vectors in (("mean", means[:, None]), ("flat", x)):  # the same as whole videos
        whole = Split({"frames": np.ascontiguousarray(vectors)}, data.train.labels, "whole")
        hasher, expected = fit_baseline(method, data.train, 4, view), fit_baseline(method, whole, 4, view)
        np.testing.assert_allclose(hasher.function.mean, expected.function.mean, rtol=1e-4, atol=1e-6)
        codes = expected.encode(whole.frames)
        for given in ((x, lengths), (noisy, lengths.tolist())):
            found = hasher.encode(given[0], lengths=given[1])
            assert (np.unpackbits(found ^ codes) == 0).mean() > 0.99  # up to the sign of a zero
        np.testing.assert_array_equal(
            encode_splits(hasher, data)["database"], hasher.encode(x, lengths=lengths)
        )
    longer = np.concatenate([x[:2], np.ones((2, 3, D), np.float32)], axis=1)
    np.testing.assert_array_equal(hasher.encode(longer), hasher.encode(longer[:, :LONGEST]))
    np.testing.assert_array_equal(hasher.encode(x[:2, :6]), hasher.encode(x[:2], lengths=[6, 6]))
    with pytest.raises(ValueError, match=r"frames: expected shape \(n, t, 5\), as in training"):
        hasher.encode(x[..., 1:], lengths=lengths)
    with pytest.raises(
        ValueError, match="lengths: expected 40 whole numbers from 1 to 14, found 0 for video 1"
    ):
        hasher.encode(x, lengths=[3, 0] + [1] * (N - 2))
