"""Published numbers: that the files hold what was printed, and how a run is judged by them."""

from __future__ import annotations

import json

import pytest

from capt.data.readers.coop_layouts import LAYOUTS
from capt.errors import CaptError, DataError
from capt.evaluation.expected import FOLDER, PROTOCOLS, expected_metrics, expected_numbers, judge, judge_run
from capt.evaluation.metrics import harmonic_mean
from capt.evaluation.protocols import aggregate_seeds, base_to_novel_table

TABLE = ("coop", "maple", "promptkd", "spotlighter", "2sfs", "tac", "lweib", "tap", "capt")
ELEVEN = list(LAYOUTS)[:11]
MODEL = "ViT-B-16-quickgelu"


def summary(rows: dict[str, tuple[float, float]], **changes: object) -> dict:
    """A base-to-novel summary of DTD as a run writes it; two seeds, one above and one below."""
    methods = {}
    for name, (base, novel) in rows.items():
        records = {
            seed: {"base": base + off, "novel": novel - off, "hm": harmonic_mean(base + off, novel - off)}
            for seed, off in (("1", 0.01), ("2", -0.01))
        }
        methods[name] = aggregate_seeds(records)
    found = {
        "schema": 1, "protocol": "base-to-novel", "dataset": "DTD", "model": MODEL, "base_model": "promptkd",
        "shots": 16, "n_classes": {"base": 24, "novel": 23}, "methods": methods,
    }  # fmt: skip
    return found | changes


class TestFiles:
    def test_there_is_one_for_each_protocol_and_no_other(self):
        assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(name.replace("-", "_") for name in PROTOCOLS)
        for protocol in PROTOCOLS:
            numbers = expected_numbers(protocol)
            assert (numbers["format"], numbers["protocol"], numbers["shots"]) == ("capt.expected", protocol, 16)
            used = {method for cells in numbers["cells"].values() for method in cells}
            assert used | set(numbers.get("printed_average", ())) == set(numbers["methods"])
            for method in numbers["methods"].values():
                assert method["source"] and method["mark"] in ("printed", "second-hand", "unverified")
        with pytest.raises(CaptError, match="base-to-novel, cross-dataset, domain-generalisation"):
            expected_numbers("few-shot")

    def test_every_cell_of_the_table_is_there(self):
        cells = expected_numbers("base-to-novel")["cells"]
        assert list(cells) == ELEVEN
        assert all(tuple(row) == TABLE for row in cells.values())
        assert cells["dtd"]["capt"] == {"base": 88.19, "novel": 72.38, "hm": 79.51}
        assert cells["imagenet"]["coop"] == {"base": 76.47, "novel": 68.78, "hm": 71.92}

    def test_contradictions_of_the_printed_table_are_exactly_those_listed(self):
        numbers = expected_numbers("base-to-novel")
        found = {}
        for dataset, row in numbers["cells"].items():
            for method, cell in row.items():
                value = harmonic_mean(cell["base"], cell["novel"])
                if abs(value - cell["hm"]) > 0.015:
                    found[dataset, method, "hm"] = (cell["hm"], round(value, 2))
        for method in TABLE:
            rows = [(row[method]["base"], row[method]["novel"]) for row in numbers["cells"].values()]
            average, printed = base_to_novel_table(rows), numbers["printed_average"][method]
            for metric, key in (("base", "base"), ("novel", "novel"), ("hm", "hm_of_means")):
                if abs(average[key] - printed[metric]) > 0.015:
                    found["average", method, metric] = (printed[metric], round(average[key], 2))
        assert found == {
            (one["where"], one["method"], one["metric"]): (one["printed"], one["from_cells"])
            for one in numbers["does_not_follow"]
        }

    def test_what_the_notes_say_about_two_digits(self):
        cells = expected_numbers("base-to-novel")["cells"]
        novel = [67.88 if dataset == "imagenet" else row["coop"]["novel"] for dataset, row in cells.items()]
        assert round(sum(novel) / 11, 2) == 63.22 and round(harmonic_mean(76.47, 67.88), 2) == 71.92
        assert round(harmonic_mean(81.56, 75.83), 2) == 78.59


class TestExpectedMetrics:
    def test_fractions_by_either_name(self):
        assert expected_metrics("base-to-novel", "StanfordCars", "promptkd") == pytest.approx(
            {"base": 0.8280, "novel": 0.8337, "hm": harmonic_mean(0.8280, 0.8337)}
        )
        for layout in LAYOUTS.values():
            by_name, by_title = (expected_metrics("base-to-novel", one, "capt") for one in (layout.name, layout.title))
            assert by_name == by_title and bool(by_name) == (layout.name in ELEVEN)

    def test_averages_come_from_the_cells_where_there_are_cells(self):
        found = expected_metrics("base-to-novel", "average", "capt")
        assert {key: round(100 * value, 2) for key, value in found.items()} == {
            "base": 87.41, "novel": 80.73, "hm": 83.94,
        }  # fmt: skip
        assert expected_metrics("base-to-novel", "average", "zero_shot")["novel"] == pytest.approx(0.7422)

    @pytest.mark.parametrize(
        ("protocol", "dataset", "method"),
        [("few-shot", "dtd", "capt"), ("base-to-novel", "emoji", "capt"), ("base-to-novel", "dtd", "linear_adapter"),
         ("cross-dataset", "dtd", "coop"), ("base-to-novel", "pets", "capt")],
    )  # fmt: skip
    def test_nothing_is_published(self, protocol, dataset, method):
        assert expected_metrics(protocol, dataset, method) == {}


class TestJudge:
    @pytest.mark.parametrize(
        ("found", "verdict"),
        [
            (0.8819, "within"),
            (0.8919, "within"),
            (0.8719, "within"),
            (0.8920, "above"),
            (0.8718, "below"),
            (1.0, "above"),
        ],
    )
    def test_tolerance_is_one_point_either_way(self, found, verdict):
        (one,) = judge("dtd", MODEL, "capt", "base-to-novel", {"base": found})
        assert (one.verdict, one.why, one.metric) == (verdict, "", "base")
        assert (one.found, one.expected, one.tolerance) == (found, 0.8819, 0.01)
        assert one.mark == "printed" and "Table 1" in one.source and "unlabelled" in one.caution

    @pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B/16", "ViT-B-16-quickgelu", "openai/clip-vit-base-patch16"])
    def test_spellings_of_the_published_backbone(self, name):
        assert judge("dtd", name, "capt", "base-to-novel", {"base": 0.88})[0].verdict == "within"

    @pytest.mark.parametrize(
        ("backbone", "options", "why"),
        [
            ("ViT-B-32", {}, "other backbone"),
            ("ViT-B-16-SigLIP", {}, "other backbone"),
            ("embedded", {}, "other backbone"),
            (MODEL, {"shots": 4}, "other number of shots: published for 16, this run used 4"),
            (MODEL, {"n_classes": 2}, "the published data set has 47 classes, this one 2"),
            (MODEL, {"base_model": "zero-shot"}, "on top of promptkd, this run used zero-shot"),
            (MODEL, {"pretrained": "laion2b_s34b_b88k"}, "other weights"),
        ],
    )
    def test_not_comparable(self, backbone, options, why):
        metrics = {"base": 0.8819, "novel": 0.5, "hm": 0.6, "net_reduction": 0.1}
        found = judge("DTD", backbone, "capt", "base-to-novel", metrics, **options)
        assert [one.metric for one in found] == ["base", "novel", "hm"]
        assert all(one.verdict == "not comparable" and why in one.why for one in found)
        assert found[0].expected == pytest.approx(0.8819)

    def test_a_base_model_of_its_own_needs_no_other(self):
        assert judge("dtd", MODEL, "coop", "base-to-novel", {"base": 0.79}, base_model="coop")[0].verdict == "within"

    def test_shipped_data_have_no_published_numbers(self):
        (one,) = judge("emoji", "embedded", "capt", "base-to-novel", {"base": 0.5})
        assert one.verdict == "not comparable" and one.expected is None and "'emoji'" in one.why

    def test_an_average_is_taken_over_the_published_targets_alone(self):
        variants = {
            LAYOUTS[name].title: value for name, value in zip(list(LAYOUTS)[11:], (0.6, 0.5, 0.5, 0.8), strict=True)
        }
        metrics = {"source": 0.7, **variants, "my photos": 0.0, "average": 0.48}
        (one,) = judge("ImageNet", MODEL, "coop", "domain-generalisation", metrics)
        assert (one.metric, one.verdict) == ("average", "within") and one.found == pytest.approx(0.6)
        assert one.mark == "second-hand"
        del metrics["ImageNet-R"]
        (one,) = judge("ImageNet", MODEL, "coop", "domain-generalisation", metrics)
        assert one.verdict == "not comparable" and "not tested: ImageNet-R" in one.why

    def test_zero_shot_needs_no_shots_and_an_unverified_number_judges_nobody(self):
        metrics = {LAYOUTS[name].title: 0.65 for name in ELEVEN[1:]}
        assert judge("imagenet", MODEL, "zero_shot", "cross-dataset", metrics, shots=4)[0].verdict == "within"
        (one,) = judge("imagenet", MODEL, "capt", "cross-dataset", metrics)
        assert (one.verdict, one.expected, one.mark) == ("not comparable", pytest.approx(0.7195), "unverified")


class TestJudgeRun:
    def test_rows_with_published_numbers_are_judged(self):
        rows = {
            "zero_shot": (0.53, 0.60),
            "promptkd": (0.8584, 0.70),
            "capt": (0.90, 0.7238),
            "linear_adapter": (0.8, 0.6),
        }
        found = judge_run(summary(rows))
        verdicts = {(one["method"], one["metric"]): one["verdict"] for one in found["judgements"]}
        assert verdicts == {
            ("promptkd", "base"): "within", ("promptkd", "novel"): "below", ("promptkd", "hm"): "within",
            ("capt", "base"): "above", ("capt", "novel"): "within", ("capt", "hm"): "within",
        }  # fmt: skip
        assert found["published"] == {"backbone": "ViT-B/16", "weights": "openai", "shots": 16}
        assert "no test of significance" in found["tolerance"]
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_harmonic_mean_is_that_of_the_seed_means(self):
        run = summary({"capt": (0.88, 0.72)})
        hm = next(one for one in judge_run(run)["judgements"] if one["metric"] == "hm")
        assert hm["found"] == pytest.approx(harmonic_mean(0.88, 0.72)) != run["methods"]["capt"]["mean"]["hm"]

    def test_summaries_of_before_there_were_protocols(self):
        run = summary({"capt": (0.88, 0.72)})
        for key in ("protocol", "base_model", "n_classes"):
            del run[key]
        assert judge_run(run) == judge_run(summary({"capt": (0.88, 0.72)}))

    @pytest.mark.parametrize(
        "changes", [{"dataset": "emoji"}, {"dataset": "pets"}, {"protocol": "few-shot"}, {"methods": {}}]
    )
    def test_nothing_to_judge(self, changes):
        assert judge_run(summary({"capt": (0.88, 0.72)}, **changes)) is None
        assert judge_run(summary({"zero_shot": (0.53, 0.6), "linear_adapter": (0.8, 0.6)})) is None

    @pytest.mark.parametrize(
        ("changes", "why"),
        [({"model": "embedded"}, "backbone"), ({"shots": 4}, "shots"), ({"base_model": "coop"}, "base model"),
         ({"n_classes": {"base": 5, "novel": 5}}, "10"), ({"pretrained": "laion400m_e32"}, "weights")],
    )  # fmt: skip
    def test_other_circumstances(self, changes, why):
        found = judge_run(summary({"capt": (0.8819, 0.7238)}, **changes))
        assert all(one["verdict"] == "not comparable" and why in one["why"] for one in found["judgements"])

    @pytest.mark.parametrize("part", ["dataset", "model", "shots", "methods"])
    def test_damaged_summary(self, part):
        run = summary({"capt": (0.88, 0.72)})
        del run[part]
        with pytest.raises(DataError, match=f"lacks a part.*{part}"):
            judge_run(run)
