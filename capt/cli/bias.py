"""``capt bias measure``, ``capt bias explain`` and ``capt bias mitigate``: center bias of a model, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from capt.cli.common import Model, ModelOptions, ProgressLine, check_out, print_json
from capt.errors import CaptError, DamagedFileError, DataError, MissingDependencyError
from capt.files import write_json

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.methods.center_bias import CenterBias


@dataclass(frozen=True)
class BiasOptions:
    """On which pictures."""

    objects: str = "emoji"
    """'emoji' (shipped), 'shapes' (drawn), or a folder of pictures with transparency, one sub-folder an object."""
    n: int = 20
    """Objects that are measured and explained; mitigate takes twice as many where there are as many."""
    candidates: int | None = None
    """Objects are those the model names best among so many; by default three times n; n: no choice."""
    cells: int = 5
    """Positions along each side, odd; fewer make larger objects."""
    fill: float = 0.8
    """Side of an object over side of a cell."""
    backgrounds: tuple[str, ...] = ("grey",)
    """Some of grey, white, noise, gradient, texture, or paths of photographs."""
    replicates: int = 1
    """Pictures of every object and position on every ground."""
    center_radius: float = 0.5
    """What counts as center: the larger of |x| and |y| up to it, 1 being the edge."""
    seed: int = 0
    """Of everything random."""

    def open(self, backbone: Backbone, progress: Any) -> CenterBias:
        """The method on these pictures."""
        from capt.methods.center_bias import CenterBias

        options = {key: value for key, value in vars(self).items() if key != "objects"}
        return CenterBias(backbone, self.objects, progress=progress, **options)


Pictures: TypeAlias = Annotated[BiasOptions, tyro.conf.OmitArgPrefixes]
OUT = Path("runs/bias")


def measure(
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    pictures: Pictures = BiasOptions(),
    photos: Path | None = None,
    level: float = 0.01,
    out: Path = OUT,
    json: bool = False,
) -> int:
    """Is the model cross-eyed? Objects at a grid of positions, and how much the preprocessing crop adds.

    Args:
        model: which CLIP model.
        pictures: objects and positions.
        photos: also run the four-way test on photographs named <object>_<relation>_<object>.jpeg in this folder.
        level: chance of a false alarm that is accepted.
        out: folder of the run; bias.json and report/index.html are written there, and parts that are there stay.
        json: print what was found as JSON.
    """
    if photos is not None and not photos.is_dir():
        raise DataError(f"--photos {photos}: no such folder; expected one of photographs")

    def found(bias: CenterBias, progress: ProgressLine) -> dict[str, Any]:
        progress("positions", 0, 1)
        parts = {"measure": bias.measure(level=level).record(), "preprocessing": bias.check_preprocessing().record()}
        if photos is not None:
            progress("photographs", 0, 1)
            parts["photographs"] = bias.photographs(photos).record()
        return parts

    return _run("measure", found, model, pictures, out, json)


def explain(
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    pictures: Pictures = BiasOptions(),
    level: float = 0.01,
    out: Path = OUT,
    json: bool = False,
) -> int:
    """Where is an off-center object lost: before the last aggregation, in it, or to another object?

    Args:
        model: which CLIP model.
        pictures: objects and positions.
        level: of the tests.
        out: folder of the run.
        json: print what was found as JSON.
    """

    def found(bias: CenterBias, _: ProgressLine) -> dict[str, Any]:
        from capt.report.bias_pictures import write_pictures

        shown = write_pictures(bias.backbone, bias.grid(), out / "report" / "pictures")
        return {"explain": bias.explain(level).record(), "pictures": shown}

    return _run("explain", found, model, pictures, out, json)


def mitigate(
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    pictures: Pictures = BiasOptions(),
    level: float = 0.05,
    passes: int = 1,
    region_objects: int = 4,
    out: Path = OUT,
    json: bool = False,
) -> int:
    """What helps without training, chosen on half of the objects and tested on the other half.

    Where a change helps, '--model bias:RUN' is the changed model for other commands. Methods that put modules between
    the layers of the image tower go around a mean over crops.

    Args:
        model: which CLIP model.
        pictures: objects and positions.
        level: of the test on held-out objects.
        passes: through the image tower that a change may take; 6: means over five crops are tried, too, and take as
            much longer.
        region_objects: objects on which visual prompts, crops and region boosts are tried; 0: none.
        out: folder of the run.
        json: print what was found as JSON.
    """

    def found(bias: CenterBias, _: ProgressLine) -> dict[str, Any]:
        mitigation = bias.mitigate(level=level, passes=passes, region_objects=region_objects)
        mitigation.save(out, {"model": model.model, "pretrained": model.pretrained})
        return {"mitigate": mitigation.record()}

    return _run("mitigate", found, model, pictures, out, json)


def _run(
    step: str,
    found: Callable[[CenterBias, ProgressLine], dict[str, Any]],
    model: ModelOptions,
    pictures: BiasOptions,
    out: Path,
    json: bool,
) -> int:
    """Do one step, merge it into ``bias.json``, write the page, print what was found."""
    from capt import report
    from capt.report.bias import FILE, words

    check_out(out)
    backbone = model.open()
    kept = _kept(out, backbone)
    wall, cpu = time.perf_counter(), time.process_time()
    with ProgressLine(quiet=json) as progress:
        parts = found(pictures.open(backbone, progress), progress)
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    about = {
        "name": backbone.name, "fingerprint": backbone.fingerprint(), "model": model.model,
        "pretrained": model.pretrained, "seed": pictures.seed,
    }  # fmt: skip
    record = {
        **kept, "schema": 1, "model": about, **parts,
        "took": {**kept.get("took", {}), step: took},
        "asked": {**kept.get("asked", {}), step: vars(pictures)},
    }  # fmt: skip
    write_json(out / FILE, record)
    try:
        page = str(report.write_bias_report(out))
    except MissingDependencyError as error:
        page = f"no page: {error}"
    if json:
        print_json(parts)
    else:
        print("\n".join(words({"model": about, **parts})))
        print(f"{took['seconds']:.0f} s ({took['cpu_seconds']:.0f} s of CPU); {page}")
    return 0


def _kept(out: Path, backbone: Backbone) -> dict[str, Any]:
    """What earlier steps wrote for the same model.

    Raises:
        CaptError: the folder holds another model's, or another kind of run.
        DamagedFileError: what is there cannot be shown.
    """
    from capt.report.bias import FILE, gather, read_bias

    if not (out / FILE).is_file():
        if (out / "run.json").exists():
            raise CaptError(f"--out {out}: holds a run of another kind; give another folder")
        return {}
    kept = read_bias(out)
    gather(out)  # what is damaged is refused before the work
    if not all(isinstance(kept.get(part, {}), dict) for part in ("took", "asked")):
        raise DamagedFileError(f"'{out / FILE}': not written by 'capt bias'; give another --out")
    try:
        name, fingerprint = kept["model"]["name"], kept["model"]["fingerprint"]
    except KeyError as error:
        raise DamagedFileError(f"'{out / FILE}': lacks {error}; give another --out") from error
    if fingerprint != backbone.fingerprint():
        raise CaptError(f"--out {out}: holds the bias of another model ({name}); give another folder")
    return kept
