"""Center bias: planted biases are found with the right sign and size, an unbiased encoder raises no false alarm."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from capt.backbones import load
from capt.data.cutouts import drawn_shapes, emoji_cutouts
from capt.data.position_grid import PositionGrid
from capt.errors import CaptError, DataError, NumericError
from capt.evaluation.center_bias import (
    NOT_SHOWN,
    NOT_TOLD,
    TO_BORDER,
    TO_CENTER,
    measure_center_bias,
    recognised_objects,
)
from capt.evaluation.planted_bias import PlantedBias
from capt.evaluation.position_results import CENTRAL, PERIPHERAL, Visibility
from capt.evaluation.scene_encoder import Functions
from tests.tiny import backbone

CLOSED_FORM = {0: 0.417, 0.5: 0.417, 1: 0.75, 1.5: 1, 2: 1, 3: 0.75, 4: 0.417}


def noisy(seed: int, beta: float) -> PlantedBias:
    """An encoder that names lone objects right in about half of the pictures."""
    return PlantedBias(12, patches=5, patch=4, beta=beta, ground=0.05, noise=0.35, seed=seed)


# ---- a bias that is known --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extra", "accuracy"), CLOSED_FORM.items())
def test_the_measurement_returns_the_closed_form_of_a_planted_bias(extra, accuracy):
    model = PlantedBias(4, extra=extra)
    found = measure_center_bias(model, model.grid(), layouts=["pair"]).pair
    ratio = np.exp((extra - 2) * np.sum(found.positions.xy[found.positions.others] ** 2, 1))
    expected = np.where(ratio < 2**0.5 - 1, CENTRAL, np.where(ratio > 2**0.5 + 1, PERIPHERAL, 0))
    assert (found.choice == expected).all()
    assert found.record()["accuracy_off"] == pytest.approx(accuracy, abs=1e-3)
    assert found.record()["accuracy_center"] == 1
    shares = np.array(found.positions.as_map(found.profile), float)
    for mirrored in (shares[::-1], shares[:, ::-1], shares.T):
        np.testing.assert_array_equal(shares, mirrored)


def test_the_gap_is_zero_exactly_where_the_bias_is_cancelled():
    gaps = {}
    for extra in (0, 2, 4):
        model = PlantedBias(4, extra=extra)
        found = measure_center_bias(model, model.grid(), layouts=["pair"])
        gaps[extra] = found.record()["pair"]["gap"]["estimate"], found.record()["pair"]["gap_half_size"]["estimate"]
    assert gaps[2] == (0, 0) and min(gaps[0] + gaps[4]) > 0.5


def test_a_competition_bias_is_no_visibility_bias():
    model = PlantedBias(20)
    found = measure_center_bias(model, model.grid(5))
    assert found.verdict == TO_CENTER == found.findings["competition"].verdict
    assert found.findings["visibility"].verdict == found.findings["lift"].verdict == NOT_SHOWN
    assert found.single.profile.min() == 1 and found.findings["visibility"].effect.estimate == 0


@pytest.mark.parametrize(("beta", "verdict"), [(1.5, TO_CENTER), (-1.5, TO_BORDER)])
def test_a_planted_bias_has_its_sign_in_every_layout(beta, verdict):
    model = PlantedBias(20, patches=5, beta=beta, ground=0.1, noise=0.2)
    found = measure_center_bias(model, model.grid(5))
    assert [finding.verdict for finding in found.findings.values()] == [verdict] * 3
    assert found.verdict == verdict and found.biased == (beta > 0)
    record = found.record()
    sign = np.sign(beta)
    assert sign * record["single"]["trend"]["distance"]["high" if beta > 0 else "low"] < 0
    assert sign * record["single"]["spearman"] < -0.5
    assert sign * (record["single"]["center_index"]["estimate"] - 1) > 0.1
    assert sign * record["full"]["gap"]["estimate"] > 0
    assert sign * (record["single"]["mcnemar"]["only_first"] - record["single"]["mcnemar"]["only_second"]) > 0


def test_an_unbiased_encoder_is_called_biased_in_at_most_10_of_200_seeds():
    alarms, accuracies = 0, []
    for seed in range(200):
        model = noisy(seed, beta=0.0)
        found = measure_center_bias(model, model.grid(5, seed=seed), layouts=["single", "pair"], pairs=6)
        alarms += found.verdict != NOT_SHOWN
        accuracies.append(found.single.profile.mean())
    assert alarms <= 10
    assert 0.3 < np.mean(accuracies) < 0.8  # neither hopeless nor perfect: there was something to mistake for a bias


def test_the_same_encoder_with_a_bias_is_found_out():
    verdicts = []
    for seed in range(10):
        model = noisy(seed, beta=1.0)
        verdicts.append(measure_center_bias(model, model.grid(5, seed=seed), layouts=["single", "pair"]).verdict)
    assert verdicts.count(TO_CENTER) == 10


def test_relabelling_positions_kills_the_gap():
    model = PlantedBias(20, patches=5, beta=1.5, ground=0.1, noise=0.2)
    found = measure_center_bias(model, model.grid(5), layouts=["single"]).single
    random, gaps = np.random.default_rng(0), []
    for _ in range(50):
        order = random.permuted(np.tile(np.arange(25), (20, 1)), axis=1)[:, None]
        gaps.append(replace(found, predicted=np.take_along_axis(found.predicted, order, 2)).gaps().mean())
    assert abs(np.mean(gaps)) < 0.02 < 0.1 < found.gaps().mean()


# ---- what the numbers mean -------------------------------------------------------------------------------------------


def by_hand() -> Visibility:
    """Two objects, one variant, 3 x 3 positions: object 0 is found in the middle row, object 1 everywhere."""
    model = PlantedBias(2)
    positions = measure_center_bias(model, model.grid(3), layouts=["single"], center_radius=0.1).single.positions
    predicted = np.array([[[1, 1, 1, 0, 0, 0, 1, 1, 1]], [[1] * 9]])
    lift = np.array([[[0.1] * 4 + [0.4] + [0.1] * 4], [[0.005] * 9]])
    return Visibility(("a", "b"), positions, predicted, np.zeros((2, 1, 9)), lift, lift * 2)


def test_profile_gap_retention_and_index_by_hand():
    found = by_hand()
    assert found.profile.tolist() == [0.5] * 3 + [1] * 3 + [0.5] * 3
    np.testing.assert_allclose(found.gaps(), [1 - 2 / 8, 0])
    np.testing.assert_allclose(found.retention(), [0.25] * 4 + [1] + [0.25] * 4)  # the second object has no lift
    np.testing.assert_allclose(found.lift_gaps(), [0.3, 0])
    assert found.center_index().estimate == pytest.approx(0.405 / ((0.4 + 0.8) / 9 + 0.005))
    record = found.record()
    assert record["accuracy"] == pytest.approx(6 / 9) and record["chance"] == 0.5
    assert record["gap"]["estimate"] == pytest.approx(0.375) and record["relative_gap"] == pytest.approx(0.375)
    assert record["gated"] == {
        "items": 2, "share": 1.0, "map": [[0.5] * 3, [1.0] * 3, [0.5] * 3], "gap_without_middle": None,
    }  # fmt: skip
    assert [ring["positions"] for ring in record["accuracy_rings"]] == [1, 8]


def test_all_positions_of_a_full_layout_are_scored_for_the_object_that_is_there():
    """An encoder that sees one patch only: of nine objects just the one in that patch is above the absent names."""
    model = PlantedBias(12, patches=3, beta=0.0)
    model.attention = torch.eye(9, dtype=torch.float64)[2]
    found = measure_center_bias(model, model.grid(3, fill=1.0), layouts=["full"], center_radius=0.3).full
    assert (found.auc[:, :, 2] == 1).all() and (np.delete(found.auc, 2, 2) == 0.5).all()


def test_drop_sides_and_orders_are_reported_by_position():
    model = PlantedBias(4)
    record = measure_center_bias(model, model.grid(), layouts=["pair"]).record()["pair"]
    assert record["choices"]["off"]["central only"] == pytest.approx(1 - CLOSED_FORM[0], abs=1e-3)
    assert record["choice_maps"]["central only"][0][0] == 1 and record["choice_maps"]["central only"][3][3] is None
    assert record["first_name_first"] == record["first_name_last"] == record["choices"]["off"]
    assert record["kept_central_less_peripheral"]["estimate"] == pytest.approx(1 - CLOSED_FORM[0], abs=1e-3)
    assert record["preference"]["low"] > 0 and record["images"] == 2 * 2 * (48 + 1 + 4)


def test_first_noun_preference_does_not_look_like_a_center_bias():
    """A text encoder that remembers mostly the first noun changes "both", never which single object is kept."""
    model = PlantedBias(8, patches=5, beta=0.0, noise=0.3)

    def first_noun(texts):
        features = model.text_features([text.split(" and ")[0] for text in texts]) * 0.9
        return torch.nn.functional.normalize(features + 0.1 * model.text_features(texts), dim=-1)

    found = measure_center_bias(Functions(model.image_features, first_noun), model.grid(5), layouts=["pair"])
    assert found.verdict == NOT_SHOWN and abs(found.findings["competition"].effect.estimate) < 0.1


def test_a_model_that_recognises_nothing_is_not_called_unbiased_without_a_word():
    model = PlantedBias(12, patches=5, patch=4, beta=3.0, ground=50.0, noise=5.0)
    found = measure_center_bias(model, model.grid(5), layouts=["single", "pair"])
    assert found.verdict == NOT_TOLD and "no better than by chance" in found.warnings[0]
    assert found.record()["warnings"] == found.warnings
    assert not measure_center_bias(PlantedBias(12), PlantedBias(12).grid(5), layouts=["single"]).warnings


def test_recognised_objects_are_those_the_model_names():
    model = PlantedBias(12, patches=5, patch=4, beta=0.0)

    def hard(texts):
        features = model.text_features(texts)
        for row, text in zip(features, texts, strict=True):
            if text.endswith(("object 1", "object 4", "object 7")):
                row[:] = 0
                row[-1] = 1
        return features

    kept = recognised_objects(Functions(model.image_features, hard), model.grid(5), 9)
    assert set(kept.names) == set(model.cutouts.names) - {"object 1", "object 4", "object 7"}
    with pytest.raises(DataError, match="n: found 13, expected 1 to 12"):
        recognised_objects(model, model.grid(5), 13)


def test_choosing_recognised_objects_makes_no_center_bias():
    gaps, alarms = [], 0
    for seed in range(30):
        model = PlantedBias(24, patches=5, patch=4, beta=0.0, ground=0.05, noise=0.35, seed=seed)
        grid = model.grid(5, seed=seed)
        found = measure_center_bias(
            model, replace(grid, cutouts=recognised_objects(model, grid, 12)), layouts=["single"]
        )
        gaps.append(found.findings["lift"].effect.estimate)
        alarms += found.verdict != NOT_SHOWN
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / len(gaps) ** 0.5 and alarms <= 2


class ByPicture:
    """An encoder whose features are noise that depends on nothing but the picture."""

    def __init__(self, seed):
        self.seed = seed

    def image_features(self, images):
        keys = [zlib.crc32(image.numpy().tobytes(), self.seed) for image in images]
        return torch.stack([torch.randn(32, generator=torch.Generator().manual_seed(key)) for key in keys])

    def text_features(self, texts):
        keys = [zlib.crc32(text.encode(), self.seed) for text in texts]
        found = torch.stack([torch.randn(32, generator=torch.Generator().manual_seed(key)) for key in keys])
        return torch.nn.functional.normalize(found, dim=-1)


def test_choosing_objects_for_an_encoder_of_noise_makes_it_neither_biased_nor_able():
    """On few positions, plain ground and drawings that look the same every time."""
    found = []
    for seed in range(20):
        model, grid = ByPicture(seed), PositionGrid(drawn_shapes(30), (48, 48), (8, 8), 3, backgrounds=("grey",))
        chosen = replace(grid, cutouts=recognised_objects(model, grid, 16))
        found.append(measure_center_bias(model, chosen, layouts=["single"]))
    assert sum(one.verdict == NOT_TOLD for one in found) >= 18
    gaps = [one.findings["lift"].effect.estimate for one in found]
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / len(gaps) ** 0.5


def test_a_test_over_too_few_units_says_so():
    model = PlantedBias(6)
    found = measure_center_bias(model, model.grid(5), layouts=["pair"])
    assert found.findings["competition"].effect.low > 0 and found.verdict == NOT_SHOWN
    assert any("3 pairs are too few" in warning for warning in found.warnings)
    enough = PlantedBias(20)
    assert not measure_center_bias(enough, enough.grid(5), layouts=["pair"]).warnings


# ---- the shipped model, records, errors ------------------------------------------------------------------------------


def test_the_shipped_model_is_measured_and_the_record_is_json():
    model = load("embedded")
    cutouts = emoji_cutouts(names=["strawberry", "tiger", "bicycle", "umbrella", "pineapple", "fire engine"])
    grid = PositionGrid.for_backbone(model, cutouts, cells=3, backgrounds=("white",))
    found = measure_center_bias(model, grid, layouts=["single", "pair"], batch_size=16)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["single"]["accuracy"] > 0.5  # chance is 1/6
    assert found.single.lift.mean() > 0.05
    assert record["cost"]["images"] == 6 * 10 + 3 * 2 * 13 == record["single"]["images"] + 6 + record["pair"]["images"]
    assert record["cost"]["seconds"] > record["cost"]["drawing_seconds"] > 0
    assert record["settings"]["grid"]["objects"]["names"] == list(found.single.names)
    middle = grid.tensor([grid.single(0, 0)[1 + 4]])
    text = model.text_features([f"a {name}" for name in found.single.names])
    assert int((model.encode_image(middle, normalize=True) @ text.T).argmax()) == found.single.predicted[0, 0, 4]


def test_results_do_not_depend_on_the_batch_size():
    model = backbone()
    grid = PositionGrid.for_backbone(model, drawn_shapes(10), cells=3, backgrounds=("noise",))
    one, other = (measure_center_bias(model, grid, batch_size=size, center_radius=0.4) for size in (5, 64))
    assert (one.single.predicted == other.single.predicted).all()
    np.testing.assert_allclose(one.single.lift, other.single.lift, atol=1e-5)
    np.testing.assert_allclose(one.pair.preference, other.pair.preference, atol=1e-5)
    np.testing.assert_allclose(one.full.auc, other.full.auc, atol=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layouts": ["triple"]}, CaptError, "found 'triple'"),
        ({"center_radius": 1.0}, CaptError, "9 of 9 positions into the center"),
        ({"center_radius": -1.0}, CaptError, "0 of 9 positions into the center"),
        ({"caption": "a thing"}, CaptError, "caption: found 'a thing'"),
        ({"level": 0}, CaptError, "level: found 0"),
        ({"batch_size": 0}, CaptError, "batch_size: found 0"),
        ({"pairs": 3}, DataError, "pairs: found 3, expected 1 to 2"),
        ({"layouts": ["full"]}, DataError, "need more than 9 objects, found 4"),
        ({"distractor": "none"}, CaptError, "distractor: found 'none'"),
    ],
)
def test_measurements_that_cannot_be_are_refused(options, error, message):
    model = PlantedBias(4)
    with pytest.raises(error, match=message):
        measure_center_bias(model, model.grid(3), **{"layouts": ["single", "pair"], **options})


def test_features_that_are_not_finite_are_refused():
    model = PlantedBias(4)
    broken = Functions(lambda images: model.image_features(images) * torch.nan, model.text_features)
    with pytest.raises(NumericError, match="image_features"):
        measure_center_bias(broken, model.grid(3), layouts=["single"])
