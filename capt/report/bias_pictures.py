"""Pictures for the report of a center bias: an object in the middle and in a corner, and where the pooling looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from capt.backbones.pooling import plain_pooling
from capt.evaluation.concept_survival import concept_scores
from capt.modules.pooling_stages import value_tokens
from capt.report.bias import overlay

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data.position_grid import PositionGrid

_SIDE = 224


@torch.no_grad()
def write_pictures(backbone: Backbone, grid: PositionGrid, folder: Path, n: int = 2) -> list[dict[str, str]]:
    """Write the pictures of the first ``n`` objects; file name and caption of each."""
    pooling, found = plain_pooling(backbone.tower), []
    for thing, name in enumerate(grid.cutouts.names[:n]):
        scenes = grid.single(thing, 0)[1:]
        text = backbone.text_features([f"a {name}"])
        for place, cell in (("in the middle", grid.middle), ("in the corner", 0)):
            picture = grid.picture(scenes[cell])
            images = grid.tensor([scenes[cell]]).to(device=backbone.device, dtype=backbone.dtype)
            inputs = pooling.inputs(images)
            row = pooling.weights(inputs)[0, :, -pooling.n_patches :].mean(0)
            scores = concept_scores(value_tokens(pooling, inputs)[0].float(), text.float())[:, 0]
            shown = {
                "as it is": picture.resize((_SIDE, _SIDE)),
                "weight of each patch in the pooling": overlay(picture, row.float().cpu().numpy(), pooling.grid),
                f"how well each patch fits 'a {name}'": overlay(picture, scores.cpu().numpy(), pooling.grid),
            }
            for number, (what, image) in enumerate(shown.items()):
                file = f"{thing}-{cell}-{number}.webp"
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / file, "WEBP", quality=85)
                found.append({"file": file, "caption": f"{name} {place}: {what}"})
    return found
