"""MSCI as a module in a plain training loop: pairs of a state and an object, some of them never trained on.

Model and images come with capt. For your own: ``capt.wrap(model, tokenizer, preprocess)`` around an open_clip or
transformers CLIP, and ``load_compositional("list.csv")`` with the columns path, state, object and split.
"""

from __future__ import annotations

import numpy as np
import torch

import capt
from capt.methods.compositional.scoring import closed_world, encode_pairs, labels_of, score


def main(model: str = "embedded-vit", n_images: int | None = None, epochs: int = 10) -> dict[str, float | None]:
    """Metrics of the seen-unseen curve in the closed world; ``n_images``: of training and of test, default all."""
    data = capt.data.load_compositional("emoji-pairs")
    backbone = capt.load(model)
    train, test = (images.subset(np.arange(len(images))[:n_images]) for images in (data.train, data.test))
    listed = torch.from_numpy(data.split_pairs["train"].copy())
    place = torch.full((len(data.pairs),), -1).index_put_((listed,), torch.arange(len(listed)))

    # --- ten lines ---
    msci = capt.MSCI(backbone, data.states, data.objects, torch.from_numpy(data.pairs.copy())[listed])
    optimizer = torch.optim.Adam(msci.trainable().values(), lr=1e-3)  # adapters, prompts, stages; CLIP stays frozen
    generator = torch.Generator().manual_seed(1)
    batches = capt.data.batches(train, backbone.preprocess, batch_size=32)
    shots = [(msci.inputs(batch.images), place[batch.labels]) for batch in batches]
    for _ in range(epochs):
        for inputs, labels in shots:
            loss = msci.losses(inputs, labels, generator)["loss"]
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    msci.eval()
    # --- end ---

    space = closed_world(data, "test")
    pixels = torch.stack([backbone.preprocess(test.image(position)) for position in range(len(test))])
    inputs = msci.inputs(pixels)
    meter = score(
        msci, encode_pairs(msci, space), space, lambda rows: inputs[rows], labels_of(data, "test")[: len(test)]
    )
    return meter.best_pairs().curve().record()


if __name__ == "__main__":
    print({name: None if value is None else round(value, 3) for name, value in main().items()})
