"""``capt data check`` and ``capt data few-shot``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from capt.cli.common import Data, DataOptions, Spec, print_json, print_rows
from capt.errors import DataError

if TYPE_CHECKING:
    from capt.data import CheckReport


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
        data: data set to check; 'coop' with --root: which of the eleven data sets are there and complete.
        where: where the data set lies.
        shots: name the classes that have fewer training images than this.
        lists_only: do not decode the images.
        json: print the findings as JSON.
    """
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
    bad: list[dict[str, str]] = []
    for name, split in data_set.splits().items():
        counts = split.counts
        splits[name] = {
            "images": len(split),
            "classes_with_images": int((counts > 0).sum()),
            "fewest": int(counts.min()) if len(counts) else 0,
            "most": int(counts.max()) if len(counts) else 0,
        }
        for index in () if lists_only else range(len(split)):
            try:
                split.image(index)
            except DataError as error:
                bad.append({"split": name, "image": split.names[index], "problem": str(error)})
    train_counts = data_set.train.counts.tolist()
    counted = list(zip(data_set.classes, train_counts, strict=True))
    problems = [f"class {name!r} has no training image" for name, count in counted if count == 0]
    few = {name: count for name, count in counted if 0 < count < shots}
    if json:
        print_json(
            {
                **data_set.record(),
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
        for problem in [*problems, *(f"{entry['split']}: {entry['problem']}" for entry in bad)]:
            print(f"problem: {problem}")
        if not problems and not bad:
            print("lists are sound; images were not decoded" if lists_only else "every image can be read")
    return DataError.exit_code if problems or bad else 0


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
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Choose k training images of each class and save the hashed list.

    Args:
        data: data set to choose from.
        where: where the data set lies.
        shots: images a class.
        seed: any whole number, 0 included; the same seed gives the same list everywhere.
        base_only: only the base classes (the first half).
        out: file to write; default: shot_<shots>-seed_<seed>.json here.
        json: print what was done as JSON.
    """
    from capt.data import base_novel, save_few_shot
    from capt.data import few_shot as choose

    data_set = where.open(data)
    if base_only:
        data_set, _ = base_novel(data_set)
    chosen = choose(data_set.train, shots, seed)
    path = out if out is not None else Path(f"shot_{shots}-seed_{seed}.json")
    digest = save_few_shot(path, chosen)
    short = chosen.meta["few_shot"]["short_classes"]
    if json:
        print_json({"file": str(path), "images": len(chosen), "blake2b": digest, "short_classes": short})
    else:
        print(f"{len(chosen)} images of {len(chosen.classes)} classes: {path} (hash {digest[:16]})")
        if short:
            print(f"{len(short)} classes have fewer than {shots} images: {', '.join(sorted(short)[:10])}")
    return 0
