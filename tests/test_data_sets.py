"""ImageSet, batches, few-shot lists, base and novel classes."""

from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch

from capt.data import (
    DataSet,
    ImageSet,
    base_novel,
    batches,
    few_shot,
    hold_out,
    load,
    load_few_shot,
    save_few_shot,
)
from capt.data.sources import MemorySource
from capt.errors import DamagedFileError, DataError
from tests.data_files import folders, picture, to_tensor


def image_set(per_class: int = 5, classes: tuple[str, ...] = ("cat", "dog", "fox"), order=None) -> ImageSet:
    items = [(f"{name}/{n}.png", label) for label, name in enumerate(classes) for n in range(per_class)]
    order = np.arange(len(items)) if order is None else order
    names, labels = zip(*(items[i] for i in order), strict=True)
    pictures = {name: picture(10 * n % 256) for n, (name, _) in enumerate(items)}
    return ImageSet(classes, labels, 100 + np.arange(len(items))[order], names, MemorySource(pictures))


class TestImageSet:
    def test_holds_what_it_was_given(self):
        images = image_set()
        assert len(images) == 15 and images.labels.dtype == images.ids.dtype == np.int64
        assert images.counts.tolist() == [5, 5, 5]
        assert images.image(3).mode == "RGB" and images.image(3).getpixel((0, 0)) == (30, 30, 30)

    def test_labels_and_ids_cannot_be_changed_behind_its_back(self):
        with pytest.raises(ValueError, match="read-only"):
            image_set().labels[0] = 2

    @pytest.mark.parametrize("indices", [[3, 1, 14], np.array([3, 1, 14]), torch.tensor([3, 1, 14])])
    def test_subset_keeps_order_and_ids(self, indices):
        part = image_set().subset(indices)
        assert part.ids.tolist() == [103, 101, 114] and part.names == ["cat/3.png", "cat/1.png", "fox/4.png"]
        assert part.classes == ("cat", "dog", "fox")

    def test_subset_by_mask_and_of_nothing(self):
        images = image_set()
        assert images.subset(images.labels == 1).ids.tolist() == [105, 106, 107, 108, 109]
        assert len(images.subset([])) == 0

    @pytest.mark.parametrize("indices", [[15], [-1], [0.5], [[1]], [True, False]])
    def test_subset_refuses_what_is_no_index(self, indices):
        with pytest.raises(DataError, match="indices"):
            image_set().subset(indices)

    def test_select_classes_renumbers_in_the_order_given(self):
        part = image_set(2).select_classes([2, 0])
        assert part.classes == ("fox", "cat")
        assert part.labels.tolist() == [1, 1, 0, 0] and part.ids.tolist() == [100, 101, 104, 105]

    def test_select_classes_without_relabelling(self):
        part = image_set(2).select_classes([2], relabel=False)
        assert part.classes == ("cat", "dog", "fox") and part.labels.tolist() == [2, 2]

    @pytest.mark.parametrize("class_ids", [[0, 0], [3], [-1]])
    def test_select_classes_refuses(self, class_ids):
        with pytest.raises(DataError, match="class_ids"):
            image_set().select_classes(class_ids)

    def test_sources_follow_their_images(self):
        images = image_set(1)
        images = ImageSet(images.classes, images.labels, images.ids, images.names, images.source, sources="xyz")
        assert images.subset([2, 0]).sources == ["z", "x"] and images.select_classes([1]).sources == ["y"]

    @pytest.mark.parametrize(
        ("labels", "ids", "message"),
        [([0, 3], [0, 1], "labels"), ([0, -1], [0, 1], "labels"), ([0, 1], [5, 5], "unique"), ([0], [0, 1], "shape")],
    )
    def test_refuses_labels_and_ids_that_do_not_fit(self, labels, ids, message):
        with pytest.raises(DataError, match=message):
            ImageSet(["a", "b"], labels, ids, ["x", "y"], MemorySource({}))

    def test_refuses_labels_that_are_no_whole_numbers(self):
        with pytest.raises(DataError, match="whole numbers"):
            ImageSet(["a"], [0.5], [0], ["x"], MemorySource({}))

    def test_fingerprint_changes_with_every_part(self):
        base = image_set(2)

        def variant(classes=base.classes, labels=base.labels, ids=base.ids, names=base.names):
            return ImageSet(classes, labels, ids, names, base.source).fingerprint()

        prints = {
            base.fingerprint(),
            variant(classes=("cat", "dog", "wolf")),
            variant(labels=[0, 0, 1, 1, 2, 1]),
            variant(ids=base.ids + 1),
            variant(names=[*base.names[:-1], "other"]),
            base.subset([1, 0, 2, 3, 4, 5]).fingerprint(),
        }
        assert len(prints) == 6
        assert variant() == base.fingerprint()

    def test_fingerprint_of_the_content_sees_changed_pixels(self):
        images = image_set(1)
        before, before_content = images.fingerprint(), images.fingerprint(content=True)
        images.source.images["cat/0.png"] = picture(99)
        assert images.fingerprint() == before and images.fingerprint(content=True) != before_content

    def test_golden_fingerprint(self):
        assert image_set(2).fingerprint() == "f78876ea58c155730fd65a64cf604871"


class TestBatches:
    def test_order_labels_ids(self):
        found = list(batches(image_set(), to_tensor, batch_size=4))
        assert [len(batch) for batch in found] == [4, 4, 4, 3]
        assert torch.cat([batch.ids for batch in found]).tolist() == list(range(100, 115))
        assert torch.cat([batch.labels for batch in found]).tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert found[0].images.shape == (4, 3, 6, 8) and found[0].labels.dtype == torch.int64
        assert found[1].images[2].unique().tolist() == [60]

    def test_drop_last(self):
        assert [len(batch) for batch in batches(image_set(), to_tensor, batch_size=4, drop_last=True)] == [4, 4, 4]

    @pytest.mark.parametrize("workers", [0, 1, 4])
    def test_shuffle_depends_on_the_generator_alone(self, workers):
        found = batches(
            image_set(),
            to_tensor,
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
            workers=workers,
        )
        ids = torch.cat([batch.ids for batch in found]) - 100
        expected = torch.randperm(15, generator=torch.Generator().manual_seed(0))
        assert ids.tolist() == expected.tolist()

    def test_epochs_differ_and_a_saved_state_repeats_them(self):
        generator = torch.Generator().manual_seed(0)

        def epoch():
            return [
                b.ids.tolist() for b in batches(image_set(), to_tensor, batch_size=5, shuffle=True, generator=generator)
            ]

        first = epoch()
        state = generator.get_state()
        second = epoch()
        assert first != second
        generator.set_state(state)
        assert epoch() == second

    def test_augmentation_is_repeatable_per_image_whatever_the_workers_and_the_batches(self):
        def augment(image, *, generator):
            return torch.rand(3, 2, 2, generator=generator)

        def run(seed, **options):
            found = batches(image_set(), augment, generator=torch.Generator().manual_seed(seed), **options)
            return {int(i): image for batch in found for i, image in zip(batch.ids, batch.images, strict=True)}

        reference = run(1, batch_size=4)
        for options in ({"batch_size": 4, "workers": 3}, {"batch_size": 7}):
            other = run(1, **options)
            assert all(torch.equal(other[i], reference[i]) for i in reference)
        assert not any(torch.equal(image, reference[i]) for i, image in run(2, batch_size=4).items())
        assert len({tuple(image.flatten().tolist()) for image in reference.values()}) == 15

    @pytest.mark.parametrize("workers", [0, 3])
    def test_bad_image_stops_with_its_name(self, workers):
        images = image_set()
        images.source.images["dog/1.png"] = b"<svg/>"
        with pytest.raises(DataError, match=r"'dog/1\.png'.*not an image.*on_bad_image='skip'"):
            list(batches(images, to_tensor, batch_size=4, workers=workers))

    @pytest.mark.parametrize("workers", [0, 3])
    def test_bad_images_are_skipped_with_a_list_and_no_other_image_changes(self, workers):
        images = image_set()
        images.source.images.update({"dog/1.png": b"", "fox/0.png": b"GIF89a"})
        stream = batches(images, to_tensor, batch_size=4, workers=workers, on_bad_image="skip")
        with pytest.warns(UserWarning, match=r"(?s)2 of 15 images were skipped.*dog/1\.png.*fox/0\.png"):
            found = list(stream)
        ids = torch.cat([batch.ids for batch in found]).tolist()
        assert ids == [i for i in range(100, 115) if i not in (106, 110)]
        assert torch.cat([batch.labels for batch in found]).tolist() == [0] * 5 + [1] * 4 + [2] * 4
        assert [len(batch) for batch in found] == [4, 4, 4, 1]
        assert [name for name, _ in stream.skipped] == ["dog/1.png", "fox/0.png"]

    def test_no_warning_without_bad_images(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(batches(image_set(), to_tensor, batch_size=4, on_bad_image="skip"))

    def test_nothing_but_bad_images_is_an_error(self):
        images = image_set(1)
        images.source.images.update(dict.fromkeys(images.names, b"no"))
        with pytest.raises(DataError, match="none of the 3 images"):
            list(batches(images, to_tensor, batch_size=2, on_bad_image="skip"))

    @pytest.mark.parametrize("result", [torch.zeros(1, 2, 2), torch.zeros(2, 2), "pixels"])
    def test_wrong_transform_is_never_skipped(self, result):
        def transform(image):
            return result if image.getpixel((0, 0)) == (0, 0, 0) else to_tensor(image)

        with pytest.raises(DataError, match=r"^transform: found .*cat/0\.png.*\[3, H, W\]"):
            list(batches(image_set(), transform, batch_size=2, on_bad_image="skip"))

    def test_transform_with_two_sizes(self):
        images = image_set(1)
        images.source.images["fox/0.png"] = picture(0, (5, 5))
        with pytest.raises(DataError, match=r"\[3, 5, 5\].*fox/0\.png.*one size"):
            list(batches(images, to_tensor, batch_size=3))

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1, "workers": -1}])
    def test_arguments_out_of_range(self, options):
        with pytest.raises(DataError, match="expected"):
            batches(image_set(), to_tensor, **options)

    def test_unknown_policy(self):
        with pytest.raises(DataError, match="on_bad_image"):
            batches(image_set(), to_tensor, batch_size=1, on_bad_image="ignore")

    def test_abandoned_iteration_ends_its_threads(self):
        import threading

        stream = batches(image_set(), to_tensor, batch_size=2, workers=2)
        next(stream)
        del stream
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("capt-data")]

    def test_empty_set_gives_no_batch(self):
        assert list(batches(image_set().subset([]), to_tensor, batch_size=2)) == []


# Written once, compared for ever: the same on every platform, Python and NumPy.
GOLDEN = {
    (2, 0): "cat/1.png cat/3.png dog/0.png dog/3.png fox/2.png fox/0.png",
    (2, 1): "cat/4.png cat/1.png dog/0.png dog/2.png fox/3.png fox/2.png",
    (3, 1): "cat/4.png cat/1.png cat/2.png dog/0.png dog/2.png dog/1.png fox/3.png fox/2.png fox/1.png",
}


class TestFewShot:
    @pytest.mark.parametrize(("shots", "seed"), GOLDEN)
    def test_golden_lists(self, shots, seed):
        assert " ".join(few_shot(image_set(), shots, seed).names) == GOLDEN[shots, seed]

    def test_golden_hash_of_the_file(self, tmp_path):
        assert save_few_shot(tmp_path / "list.json", few_shot(image_set(), 2, 1)) == "155fc403b7f0377f4584d55014445a86"

    def test_golden_list_of_odd_names(self):
        images = image_set(4, ("🦊", "キツネ", "ثعلب"))
        assert few_shot(images, 1, 7).names == ["🦊/1.png", "キツネ/2.png", "ثعلب/3.png"]

    def test_order_of_images_does_not_matter(self):
        order = np.random.default_rng(0).permutation(15)
        first, second = few_shot(image_set(), 2, 5), few_shot(image_set(order=order), 2, 5)
        assert first.names == second.names and first.ids.tolist() == second.ids.tolist()

    def test_other_classes_do_not_matter(self):
        whole, alone = few_shot(image_set(), 2, 5), few_shot(image_set().select_classes([2, 1]), 2, 5)
        assert set(alone.names) == {name for name in whole.names if not name.startswith("cat")}

    def test_unicode_form_of_file_names_does_not_matter(self):
        def named(e):
            names = [f"caf{e}/{n}.png" for n in range(6)]
            return ImageSet(["x"], [0] * 6, np.arange(6), names, MemorySource({}))

        assert few_shot(named("é"), 2, 0).ids.tolist() == few_shot(named("e\u0301"), 2, 0).ids.tolist()

    def test_fewer_shots_are_part_of_more(self):
        assert set(few_shot(image_set(), 2, 9).names) < set(few_shot(image_set(), 3, 9).names)

    def test_seeds_differ_and_zero_is_a_seed(self):
        lists = {tuple(few_shot(image_set(30), 4, seed).names) for seed in (0, 1, 2, 3, -1)}
        assert len(lists) == 5
        assert few_shot(image_set(30), 4, 0).names == few_shot(image_set(30), 4, 0).names

    def test_choice_is_even(self):
        counts = np.zeros(20)
        for seed in range(400):
            for image_id in few_shot(image_set(20, ("only",)), 5, seed).ids:
                counts[image_id - 100] += 1
        assert counts.min() > 60 and counts.max() < 140  # 100 expected, standard deviation 8.7

    def test_short_classes_give_all_and_are_recorded(self):
        images = image_set().subset([0, 1, 2, 5, 10, 11])
        chosen = few_shot(images, 2, 1)
        assert chosen.counts.tolist() == [2, 1, 2]
        assert chosen.meta["few_shot"] == {"shots": 2, "seed": 1, "short_classes": {"dog": 1}}

    def test_class_without_images_is_recorded(self):
        assert few_shot(image_set().subset([0, 5]), 1, 1).meta["few_shot"]["short_classes"] == {"fox": 0}

    @pytest.mark.parametrize("shots", [0, -1, 1.5, True, "4"])
    def test_refuses_shots(self, shots):
        with pytest.raises(DataError, match="shots"):
            few_shot(image_set(), shots, 1)

    @pytest.mark.parametrize("seed", [None, 1.0, "1", True])
    def test_refuses_seeds(self, seed):
        with pytest.raises(DataError, match="seed"):
            few_shot(image_set(), 1, seed)

    def test_saved_and_loaded(self, tmp_path):
        chosen = few_shot(image_set(), 2, 0)
        digest = save_few_shot(tmp_path / "list.json", chosen)
        again = load_few_shot(tmp_path / "list.json", image_set(order=np.arange(15)[::-1]))
        assert again.names == chosen.names and again.ids.tolist() == chosen.ids.tolist()
        assert again.meta["few_shot"]["blake2b"] == digest and again.meta["few_shot"]["seed"] == 0

    def test_file_has_no_absolute_path(self, tmp_path):
        data = load(folders(tmp_path / "data", {"cat": 3, "dog": 3}))
        save_few_shot(tmp_path / "list.json", few_shot(data.train, 1, 1))
        assert str(tmp_path) not in (tmp_path / "list.json").read_text()

    @pytest.mark.parametrize("change", ["name", "shots", "hash", "drop", "format"])
    def test_changed_file_is_refused(self, tmp_path, change):
        path = tmp_path / "list.json"
        save_few_shot(path, few_shot(image_set(), 2, 0))
        record = json.loads(path.read_text())
        if change == "name":
            record["images"][0]["name"] = "cat/9.png"
        elif change == "shots":
            record["shots"] = 3
        elif change == "hash":
            del record["blake2b"]
        elif change == "drop":
            record["images"].pop()
        else:
            record["format"] = "other"
        path.write_text(json.dumps(record))
        with pytest.raises(DamagedFileError, match=r"list\.json"):
            load_few_shot(path, image_set())

    @pytest.mark.parametrize("record", [{}, {"classes": 3, "images": []}, {"classes": [], "images": [3]}])
    def test_file_with_the_right_hash_and_the_wrong_parts(self, tmp_path, record):
        record = {"format": "capt.few_shot", "version": 1, **record}
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        record["blake2b"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        (tmp_path / "list.json").write_text(json.dumps(record))
        with pytest.raises(DamagedFileError, match="lacks a part"):
            load_few_shot(tmp_path / "list.json", image_set())

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (image_set(classes=("cat", "dog", "wolf")), "other class names"),
            (image_set().subset(np.arange(14)[::3]), "not in this data set"),
            (
                ImageSet(image_set().classes, image_set().labels, np.arange(15), image_set().names, MemorySource({})),
                "id",
            ),
        ],
    )
    def test_list_of_other_data_is_refused(self, tmp_path, other, message):
        path = tmp_path / "list.json"
        save_few_shot(path, few_shot(image_set(), 4, 0))
        with pytest.raises(DataError, match=message):
            load_few_shot(path, other)

    def test_hold_out(self):
        kept, held = hold_out(image_set(10), 0.25)
        assert kept.counts.tolist() == [7, 7, 7] and held.counts.tolist() == [3, 3, 3]
        assert sorted([*kept.ids, *held.ids]) == list(range(100, 130))
        assert hold_out(image_set(10), 0.25, seed=1)[1].names != held.names

    def test_hold_out_always_leaves_and_takes_one(self):
        kept, held = hold_out(image_set(2), 0.01)
        assert kept.counts.tolist() == held.counts.tolist() == [1, 1, 1]
        kept, held = hold_out(image_set(2), 0.99)
        assert kept.counts.tolist() == [1, 1, 1]
        kept, held = hold_out(image_set(1), 0.5)
        assert len(kept) == 3 and len(held) == 0

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
    def test_hold_out_refuses(self, fraction):
        with pytest.raises(DataError, match="test_fraction"):
            hold_out(image_set(), fraction)


class TestBaseNovel:
    def data(self, n_classes=5):
        images = image_set(4, tuple("abcdefg"[:n_classes]))
        return DataSet(
            "letters", images.subset(images.ids % 2 == 0), None, images.subset(images.ids % 2 == 1), images.classes
        )

    def test_33_odd_class_goes_to_base_and_novel_is_renumbered(self):
        base, novel = base_novel(self.data())
        assert base.classes == ("a", "b", "c") and novel.classes == ("d", "e")
        assert novel.train.labels.tolist() == [0, 0, 1, 1] and novel.train.classes == ("d", "e")
        assert novel.train.ids.tolist() == [112, 114, 116, 118] and novel.test.ids.tolist() == [113, 115, 117, 119]
        assert base.val is None and (base.meta["classes_used"], novel.meta["classes_used"]) == ("base", "novel")

    def test_even(self):
        base, novel = base_novel(self.data(4))
        assert base.classes == ("a", "b") and novel.classes == ("c", "d")

    def test_no_image_is_in_both(self):
        base, novel = base_novel(self.data())
        assert not {*base.train.ids, *base.test.ids} & {*novel.train.ids, *novel.test.ids}

    def test_named_list(self):
        base, novel = base_novel(self.data(), base=["e", "a"])
        assert base.classes == ("e", "a") and novel.classes == ("b", "c", "d")
        assert base.train.labels.tolist() == [1, 1, 0, 0] and base.train.ids.tolist() == [100, 102, 116, 118]

    @pytest.mark.parametrize("base", [["z"], [], list("abcde"), ["a", "a"]])
    def test_named_list_is_checked(self, base):
        with pytest.raises(DataError):
            base_novel(self.data(), base=base)

    def test_one_class_cannot_be_split(self):
        with pytest.raises(DataError, match="1 classes cannot be split"):
            base_novel(self.data(1))

    def test_fingerprints_of_the_halves_differ(self):
        base, novel = base_novel(self.data())
        assert len({base.fingerprint(), novel.fingerprint(), self.data().fingerprint()}) == 3
