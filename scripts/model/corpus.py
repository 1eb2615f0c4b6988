"""The texts on which the small text tower learns to agree with the teacher, and their MiniLM embeddings."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from emoji_sources import Emoji, read_concepts

from .encoders import MiniLM, allow_torchvision
from .leak import EvaluationRule

PLAIN = ("{}", "a photo of a {}.", "a picture of a {}", "an icon of a {}", "a drawing of a {}", "a cartoon {}",
         "an emoji of a {}", "clip art of a {}")  # fmt: skip
JOINED = ("{} with {}", "{} and {}", "{} of {}", "{} {}", "{} on {}", "{} for {}", "no {}, only {}")
ADJECTIVES = ("red green blue yellow orange purple pink black white grey brown dark light small large old young broken "
              "happy sad angry wet ripe sliced open closed wild baby soft hot cold racing running smiling crying "
              "sleeping flying wooden glass round four-leaf two-headed")  # fmt: skip


def _wordnet() -> tuple[list[list[str]], list[str]]:
    """Lemmas (a list for each of timm's 21,844 synsets) and definitions."""
    allow_torchvision()
    import timm

    folder = Path(timm.__file__).parent / "data" / "_info"
    column = {}
    for kind in ("lemma", "definition"):
        lines = (folder / f"imagenet_synset_to_{kind}.txt").read_text().splitlines()
        column[kind] = [line.split("\t")[1].strip() for line in lines if "\t" in line]
    return [lemmas.split(", ") for lemmas in column["lemma"]], column["definition"]


def build_texts(work: Path, pictures: dict, seed: int = 0) -> list[str]:
    """All texts, lower case, distinct and sorted; names of evaluation classes are left out of the emoji part."""
    allow_torchvision()
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    rng = random.Random(seed)
    rule = EvaluationRule(read_concepts())
    texts = [template.format(name) for name in IMAGENET_CLASSNAMES for template in PLAIN]
    texts += [rng.choice(OPENAI_IMAGENET_TEMPLATES)(name) for name in IMAGENET_CLASSNAMES for _ in range(4)]
    labels = Emoji(work).labels()
    keys = sorted({key for _, key in pictures["emoji"]})
    emoji_names = [key.replace("-", " ") for key in keys]
    texts += [rng.choice(PLAIN).format(name) for name in emoji_names for _ in range(3)] + emoji_names
    tags = sorted({tag for key in keys if key in labels for tag in labels[key].get("tags", [])})
    texts += [tag for tag in tags if not rule.text(tag)]
    for record in pictures["art"]:
        title, keywords = record["title"], record["keywords"]
        texts += [title, ", ".join(keywords[:4]), ", ".join([title, *keywords[:1]])]
    lemmas, definitions = _wordnet()
    for group in lemmas:
        texts += [group[0], rng.choice(PLAIN[1:]).format(group[0]), rng.choice(PLAIN).format(rng.choice(group))]
    texts += [text for text in rng.sample(definitions, 8000) if len(text) < 110]
    nouns = [group[0] for group in lemmas if len(group[0]) < 16] + 4 * emoji_names + 4 * list(IMAGENET_CLASSNAMES)
    composed = [rng.choice(PLAIN).format(f"{rng.choice(ADJECTIVES.split())} {rng.choice(nouns)}") for _ in range(9000)]
    composed += [rng.choice(JOINED).format(rng.choice(nouns), rng.choice(nouns)) for _ in range(9000)]
    composed += [rng.choice(PLAIN).format(f"{rng.choice(nouns)} face") for _ in range(1500)]
    texts += [text for text in composed if not rule.text(text)]
    return sorted({text.strip().lower() for text in texts if text.strip()})


def corpus(work: Path, pictures: dict) -> tuple[list[str], torch.Tensor]:
    """Texts and MiniLM embeddings float32 [N, 384], cached in `work/fit/corpus.pt`."""
    cache = work / "fit" / "corpus.pt"
    if not cache.exists():
        texts = build_texts(work, pictures)
        print(f"{len(texts)} texts", flush=True)
        torch.save({"texts": texts, "embeddings": MiniLM().encode(texts, bf16=True)}, cache)
    stored = torch.load(cache)
    return stored["texts"], stored["embeddings"]


def token_embeddings(work: Path, width: int, vocabulary: list[str]) -> torch.Tensor:
    """A start for the text tower's token table: MiniLM on every BPE token's letters, cut to `width` by PCA."""
    cache = work / "fit" / "tokens.pt"
    if not cache.exists():
        torch.save(MiniLM().encode([token.replace("</w>", "") or " " for token in vocabulary], bf16=True), cache)
    embeddings = torch.load(cache)
    centred = embeddings - embeddings.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    return centred @ axes.flip(1)[:, :width]
