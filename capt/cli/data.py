"""``capt data check`` and ``capt data few-shot``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from capt.cli.common import Data, DataOptions, Spec, print_json, print_rows
from capt.errors import DataError

if TYPE_CHECKING:
    from capt.data import CheckReport, DataSet, ImageSet
    from capt.data.image_set import Splits


def check(
    data: Spec,
    /,
    where: Data = DataOptions(),  # noqa: B008 - frozen
    shots: int = 16,
    lists_only: bool = False,
    json: bool = False,
) -> int:
    """Read a data set, decode every image, and say what is in it and what is wrong; exit code 3 if anything is.

    Args:
        data: data set to check; 'coop' with --root: which of CoOp's data sets are there and complete. Compositional:
            'emoji-pairs', 'czsl:mit-states' and its like with --root, or a list with the columns state and object.
            Multi-label: 'clipart', 'coco-lt' or 'voc-lt' with --root, or a list with the column labels.
        where: where the data set lies.
        shots: name the classes that have fewer training images than this.
        lists_only: do not decode the images.
        json: print the findings as JSON.
    """
    if _is_compositional(data):
        return _check_pairs(data, where, lists_only, json)
    if _is_multi_label(data):
        return _check_multi_label(data, where, lists_only, json)
    layout = None
    if data == "coop" or data.startswith("coop:"):
        layout = _check_layout(data, where)
        if json and (not layout.ok or data == "coop"):
            print_json(layout.as_dict())
        elif not json:
            print(layout.text())
        if not layout.ok or data == "coop":
            return 0 if layout.ok else DataError.exit_code
    data_set = where.open(data)
    splits: dict[str, Any] = {}
    bad = [] if lists_only else _bad_images(data_set)
    for name, split in data_set.splits().items():
        counts = split.counts
        splits[name] = {
            "images": len(split),
            "classes_with_images": int((counts > 0).sum()),
            "fewest": int(counts.min()) if len(counts) else 0,
            "most": int(counts.max()) if len(counts) else 0,
        }
    # A data set that is for testing only has no training images to miss.
    which, main = ("training", data_set.train) if len(data_set.train) else ("test", data_set.test or data_set.train)
    counted = list(zip(data_set.classes, main.counts.tolist(), strict=True))
    problems = [f"class {name!r} has no {which} image" for name, count in counted if count == 0]
    few = {name: count for name, count in counted if 0 < count < shots and which == "training"}
    if json:
        print_json(
            {
                **data_set.record(),
                **({} if layout is None else {"layout": layout.as_dict()["findings"][0]}),
                "splits": splits,
                "images_checked": not lists_only,
                "bad_images": bad,
                "problems": problems,
                f"classes_below_{shots}_shots": few,
            }
        )
    else:
        print(f"{data_set.name}: {len(data_set.classes)} classes, fingerprint {data_set.fingerprint()[:16]}")
        header = ["split", "images", "classes with images", "fewest a class", "most a class"]
        print_rows(header, [[name, *values.values()] for name, values in splits.items()])
        if few:
            smallest = min(few, key=lambda name: few[name])
            print(f"{len(few)} classes have fewer than {shots} training images (least: {smallest!r}, {few[smallest]})")
        _print_problems(problems, bad, lists_only)
    return DataError.exit_code if problems or bad else 0


def _bad_images(data: Splits[Any]) -> list[dict[str, str]]:
    """Decode every image; what is wrong with those that cannot be had."""
    bad = []
    for name, split in data.splits().items():
        for index in range(len(split)):
            try:
                split.image(index)
            except DataError as error:
                bad.append({"split": name, "image": split.names[index], "problem": str(error)})
    return bad


def _print_problems(problems: list[str], bad: list[dict[str, str]], lists_only: bool) -> None:
    for problem in [*problems, *(f"{entry['split']}: {entry['problem']}" for entry in bad)]:
        print(f"problem: {problem}")
    if not problems and not bad:
        print("lists are sound; images were not decoded" if lists_only else "every image can be read")


def _is_compositional(data: str) -> bool:
    from capt.data.readers.pair_table import is_pair_table

    return data == "emoji-pairs" or data.startswith("czsl:") or is_pair_table(data)


def _check_pairs(spec: str, where: DataOptions, lists_only: bool, json: bool) -> int:
    """What is in a compositional data set, and what is wrong with it."""
    options = {"warn": False} if spec.startswith("czsl:") else {}  # what it would warn of is printed as notes
    data = where.open_pairs(spec, **options)
    counts = data.counts()
    problems = [
        f"{split}: no image of {kind} pairs" for split in ("val", "test") for kind in ("seen", "unseen")
        if not counts[split][f"{kind}_images"]
    ]  # fmt: skip
    listed = data.split_pairs["train"]
    empty = [data.data.classes[pair] for pair in listed if not data.train.counts[pair]]
    if empty:
        problems.append(f"{len(empty):,} of {len(listed):,} training pairs have no training image, first {empty[0]!r}")
    notes = [*data.data.meta.get("differs_from_published", []), *_left_out(data.data.meta)]
    bad = [] if lists_only else _bad_images(data.data)
    if json:
        findings = {"images_checked": not lists_only, "bad_images": bad, "problems": problems, "notes": notes}
        print_json({**data.record(), **findings})
        return DataError.exit_code if problems or bad else 0
    sizes = f"{len(data.states):,} states, {len(data.objects):,} objects, {len(data.pairs):,} pairs"
    print(f"{data.name}: {sizes} ({int(data.seen.sum()):,} seen), fingerprint {data.fingerprint()[:16]}")
    header = ["split", "pairs seen", "pairs unseen", "images of seen pairs", "images of unseen pairs"]
    print_rows(header, [[split, *values.values()] for split, values in counts.items()])
    for note in notes:
        print(f"note: {note}")
    _print_problems(problems, bad, lists_only)
    return DataError.exit_code if problems or bad else 0


def _is_multi_label(data: str) -> bool:
    from capt.data.readers.label_table import is_label_table
    from capt.data.readers.long_tail_lists import LAYOUTS

    return data == "clipart" or data in LAYOUTS or is_label_table(data)


def _check_multi_label(spec: str, where: DataOptions, lists_only: bool, json: bool) -> int:
    """What is in a multi-label data set, and what is wrong with it."""
    from capt.data.readers.long_tail_lists import LAYOUTS

    options = {"warn": False} if spec in LAYOUTS else {}  # what it would warn of is printed as notes
    data = where.open_labels(spec, **options)
    counts, record = data.counts(), data.record()
    problems = [] if len(data.train) else ["no training image"]
    notes = [*data.meta.get("differs_from_published", [])]
    if data.meta["repeated_labels"]:
        notes.append(f"{data.meta['repeated_labels']:,} labels are given to their image twice; they count once")
    for split, images in data.splits().items():
        empty = [name for name, count in zip(data.classes, images.counts.tolist(), strict=True) if not count]
        if empty and len(images):
            notes.append(f"{split}: no image of {len(empty):,} of {len(data.classes):,} classes, first {empty[0]!r}")
    bad = [] if lists_only else _bad_images(data)
    if json:
        findings = {"images_checked": not lists_only, "bad_images": bad, "problems": problems, "notes": notes}
        print_json({**record, **findings})
        return DataError.exit_code if problems or bad else 0
    groups = ", ".join(f"{count} {name}" for name, count in record["groups"].items())
    print(f"{data.name}: {len(data.classes):,} classes ({groups}), fingerprint {data.fingerprint()[:16]}")
    header = ["split", "images", "labels", "labels an image", "without label", "classes without image"]
    print_rows(header, [[split, *values.values()] for split, values in counts.items()])
    for note in notes:
        print(f"note: {note}")
    _print_problems(problems, bad, lists_only)
    return DataError.exit_code if problems or bad else 0


def _left_out(meta: dict[str, Any]) -> list[str]:
    reasons = {
        "not_annotated": "records without state or split (NA)",
        "pair_in_no_list": "records whose pair is in no pair file",
        "repeated": "records that repeat an earlier one",
    }
    skipped = meta.get("skipped_records", {})
    notes = [f"{skipped[reason]:,} {words} were left out" for reason, words in reasons.items() if skipped.get(reason)]
    for split, count in meta.get("images_of_pairs_their_split_does_not_list", {}).items():
        if count:
            notes.append(f"{count:,} {split} images show a pair that only the file of another split lists; they stay")
    return notes


def _check_layout(data: str, where: DataOptions) -> CheckReport:
    from capt.data import check as check_layout

    if where.root is None:
        raise DataError(f"'{data}': --root is missing; give the folder that holds the data sets")
    return check_layout(where.root, data.removeprefix("coop").removeprefix(":") or None)


def few_shot(
    data: Spec,
    /,
    where: Data = DataOptions(),  # noqa: B008 - frozen
    shots: int = 16,
    seed: int = 1,
    base_only: bool = False,
    from_pickle: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Choose k training images of each class and save the hashed list; or take over a list of CoOp.

    Args:
        data: data set to choose from.
        where: where the data set lies.
        shots: images a class.
        seed: any whole number, 0 included; the same seed gives the same list everywhere.
        base_only: only the base classes (the first half).
        from_pickle: a list that CoOp stored, split_fewshot/shot_<k>-seed_<s>.pkl, or a folder of such lists, instead of
            a choice of our own; shots and seed are those in its name. Validation images go to <list>-val.json.
        out: file to write, or folder if there are several lists; default: shot_<shots>-seed_<seed>.json here.
        json: print what was done as JSON.
    """
    from capt.data import base_novel, save_few_shot
    from capt.data import few_shot as choose

    data_set = where.open(data)
    if from_pickle is not None:
        written = _take_over(from_pickle, data_set, base_only, out)
    else:
        if base_only:
            data_set, _ = base_novel(data_set)
        chosen = choose(data_set.train, shots, seed)
        path = out if out is not None else Path(f"shot_{shots}-seed_{seed}.json")
        written = [_written(path, chosen, save_few_shot(path, chosen))]
    if json:
        print_json(written[0] if from_pickle is None else written)
        return 0
    for one in written:
        short = one["short_classes"]
        print(f"{one['images']} images of {one['classes']} classes: {one['file']} (hash {one['blake2b'][:16]})")
        if short:
            print(f"{len(short)} classes have fewer images than shots: {', '.join(sorted(short)[:10])}")
    return 0


def _take_over(pickles: Path, data: DataSet, base_only: bool, out: Path | None) -> list[dict[str, Any]]:
    """Rewrite CoOp's lists as ours; what was written."""
    from capt.data import save_few_shot
    from capt.data.names import natural_key
    from capt.data.readers.coop_few_shot import coop_few_shot_sets

    several = pickles.is_dir()
    paths = sorted(pickles.glob("*.pkl"), key=lambda path: natural_key(path.name)) if several else [pickles]
    if not paths:
        raise DataError(f"--from-pickle {pickles}: the folder holds no .pkl file; give CoOp's split_fewshot folder")
    written = []
    for path in paths:
        plain = Path(path.stem + ".json")
        main = plain if out is None else out / plain if several else out
        if several:
            main.parent.mkdir(parents=True, exist_ok=True)
        for split, images in coop_few_shot_sets(path, data, base_only=base_only).items():
            place = main if split == "train" else main.with_name(f"{main.stem}-{split}{main.suffix}")
            written.append({"list": path.name, **_written(place, images, save_few_shot(place, images))})
    return written


def _written(path: Path, images: ImageSet, digest: str) -> dict[str, Any]:
    return {
        "file": str(path),
        "images": len(images),
        "classes": len(images.classes),
        "blake2b": digest,
        "short_classes": images.meta["few_shot"]["short_classes"],
    }
