"""The parts of CPRFL in a plain training loop: labels of an image from text embeddings and patches of any CLIP.

Model and images come with capt. For your own: ``capt.wrap(model, tokenizer, preprocess)`` around an open_clip or
transformers CLIP, and ``load_multi_label("list.csv")`` with the columns path, labels and split.
"""

from __future__ import annotations

import numpy as np
import torch

import capt
from capt.evaluation import MultiLabelResult


def main(model: str = "embedded", n_images: int | None = None, epochs: int = 10) -> float:
    """Mean average precision on the test images; ``n_images``: of training and of test, default all."""
    data = capt.data.load_multi_label("clipart")
    backbone = capt.load(model)
    assert data.test is not None
    train, test = (images.subset(np.arange(len(images))[:n_images]) for images in (data.train, data.test))
    targets = torch.from_numpy(train.targets.copy())
    with torch.no_grad():
        names = [f"a photo of a {name}." for name in data.classes]
        text = backbone.text_tower.encode(backbone.tokenize(names)).float()  # [C, d_t], not normalised
        patches, test_patches = (
            torch.cat(
                [
                    backbone.tower.patches(backbone.tower.run(batch.images)).float()
                    for batch in capt.data.batches(images, backbone.preprocess, batch_size=32)
                ]
            )
            for images in (train, test)
        )  # [N, W, D] each

    # --- ten lines ---
    initialiser = capt.modules.PromptInitialiser(text.shape[1], 256)  # text embeddings to category prompts
    project = torch.nn.Linear(patches.shape[-1], 256)
    interaction = capt.modules.VisualSemanticInteraction(256)  # prompts look at the patches and at each other
    asymmetric = capt.modules.AsymmetricLoss(gamma_pos=0, gamma_neg=4, margin=0.05)
    parts = torch.nn.ModuleList([initialiser, project, interaction])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=5e-4, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(len(patches)).split(16):
            loss = asymmetric(interaction.scores(project(patches[batch]), initialiser(text)), targets[batch])
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    # --- end ---

    parts.eval()
    with torch.no_grad():
        prompts = initialiser(text)
        scores = torch.cat([interaction.scores(project(part), prompts) for part in test_patches.split(32)])
    return MultiLabelResult.of(scores, test.targets, data.frequency).mean()


if __name__ == "__main__":
    print(f"mAP {100 * main():.1f}")
