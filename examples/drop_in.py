"""A plain open_clip script, and the ten lines that make its model learn from its own confusions.

Runs in about a minute on two CPU cores: the checkpoint that ships with capt, a few classes of the shipped images.
For your own: any open_clip model name and tag, and ``capt.data.load("folder/")``.
"""

from __future__ import annotations

import open_clip
import torch

import capt


def main(n_classes: int = 24, epochs: int = 20) -> tuple[float, float]:
    """Accuracy on test images before and after; 4 training images a class."""
    name = f"local-dir:{capt.backbones.embedded.embedded_folder()}"  # or "ViT-B-16", with pretrained="..."
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    data = capt.data.load("emoji").select_classes(range(n_classes))
    train, test = data.train, data.test
    assert test is not None

    # --- ten lines ---
    backbone = capt.wrap(model, tokenizer, preprocess)  # frozen; encode_image and encode_text still work
    bank = capt.ConfusionBank.build(backbone, train)  # the training images that it gets wrong
    print(*bank.top_pairs(3), sep="\n")  # (true class, predicted class, how often)
    clf = capt.CAPT(backbone, train.classes, bank=bank)  # retrieval, adapter and experts over your model
    optimizer = torch.optim.AdamW(clf.trainable().values(), lr=1e-3)
    shots = [(clf.tokens(b.images), b.labels, b.ids) for b in capt.data.batches(train, preprocess, batch_size=32)]
    for _ in range(epochs):
        for tokens, labels, ids in shots:
            loss = clf.losses(tokens, labels, bank_tokens=None, sample_ids=ids)["loss"]
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    # --- end ---

    logits = torch.cat([clf.logits(b.images) for b in capt.data.batches(test, preprocess, batch_size=32)])
    text = backbone.class_text_features(test.classes)
    with torch.inference_mode():
        features = [backbone.image_features(b.images) for b in capt.data.batches(test, preprocess, batch_size=32)]
    before = capt.evaluation.accuracy(test.labels, (torch.cat(features) @ text.T).argmax(1))
    after = capt.evaluation.accuracy(test.labels, logits.argmax(1))
    print(f"accuracy on test images: {before:.1%} before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    main()
