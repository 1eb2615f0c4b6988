"""The rule that keeps the evaluation classes out of the fit, for emoji, for clip art and for texts."""

from __future__ import annotations

import re

from emoji_sources import SCRIPTS, Concept

# Drawn almost like an evaluation class although the name shares no word with it.
LOOKALIKES = {"high-speed-train", "prohibited", "shamrock"}


def words(text: str) -> frozenset[str]:
    """The words of a name, lower case and roughly singular."""
    return frozenset(map(_singular, re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))))


def _singular(word: str) -> str:
    for ending, cut in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("ves", "f")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + cut
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def phrase(text: str) -> str:
    """A name in the form in which two spellings of it compare equal: no digits, no punctuation, singular words."""
    return " ".join(map(_singular, re.findall(r"[a-z]+", text.lower().replace("'", ""))))


class EvaluationRule:
    """Answers, for a thing that could enter the fit, whether it belongs to a class of the evaluation set."""

    def __init__(self, concepts: list[Concept]):
        self.names: set[str] = set()
        lines = (SCRIPTS / "data" / "evaluation_synonyms.txt").read_text().splitlines()
        self.synonyms = {phrase(line) for line in lines if not line.startswith("#")}
        self.word_sets: set[frozenset[str]] = set()
        for concept in concepts:
            for name in (concept.name, concept.key):
                forms = {name.replace("-", " ")}
                if concept.group == "animal faces":
                    forms.add(re.sub(r"[ -]face$", "", name))
                self.names |= {phrase(form) for form in forms}
                self.word_sets |= {words(form) for form in forms}

    def emoji(self, key: str) -> bool:
        """True for a class itself and for every variant: a key whose words include all words of a class name."""
        have = words(key)
        return key in LOOKALIKES or any(name <= have for name in self.word_sets)

    def text(self, text: str) -> bool:
        """True if the text is the name of a class."""
        return phrase(text) in self.names

    def picture(self, title: str, keywords: list[str]) -> bool:
        """True if the title holds the name of a class, or if a keyword or the title is a name or synonym of one."""
        padded = f" {phrase(title)} "
        banned = self.names | self.synonyms
        return any(phrase(text) in banned for text in (title, *keywords)) or any(f" {n} " in padded for n in self.names)
