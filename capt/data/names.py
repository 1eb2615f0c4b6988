"""Class names, image names and paths: what is accepted and how it is compared."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from capt.errors import DataError

# Invisible and without any meaning inside a name. The joiners U+200C and U+200D are not here: emoji
# sequences, Persian and Indic scripts need them.
_MEANINGLESS = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))
_DIGITS = re.compile(r"([0-9]+)")
_DRIVE = re.compile(r"^[A-Za-z]:([\\/]|$)")


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which "item 2" comes before "item 10"; equal on every platform and locale."""
    parts = []
    for part in _DIGITS.split(text):
        if part[:1].isascii() and part[:1].isdigit():
            digits = part.lstrip("0")
            parts.append((0, len(digits), digits))  # as numbers compare, without the cost of huge ones
        elif part:
            parts.append((1, 0, part))
    return parts, text


def normal_class_name(name: str, where: str) -> str:
    """NFC form of a class name without surrounding space.

    Raises:
        DataError: the name is empty or has control characters or undecodable bytes; ``where`` says which one.
    """
    text = unicodedata.normalize("NFC", name).strip()
    if not text.translate(_MEANINGLESS).strip():
        raise DataError(f"{where}: the class name {name!r} is empty; give the class a name that can stand in a prompt")
    bad = [character for character in text if unicodedata.category(character) in ("Cc", "Cs")]
    if bad:
        raise DataError(f"{where}: the class name {name!r} has the control character {bad[0]!r}; rename the class")
    return text


def class_key(name: str) -> str:
    """What two class names must not share: their NFC text without invisible, meaningless characters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).translate(_MEANINGLESS).strip())


def class_list(names: Iterable[str], where: str, *, allow_duplicates: bool = False) -> tuple[str, ...]:
    """Class names in the order given, normalised and checked.

    Args:
        names: one name per class.
        where: the file or argument they come from, for messages.
        allow_duplicates: for published lists that repeat a name (CLIP's ImageNet names do).

    Raises:
        DataError: no class, an unusable name, or two names that are the same after NFC normalisation.
    """
    given = list(names)
    if not given:
        raise DataError(f"{where}: found no class; expected at least one")
    seen: dict[str, str] = {}
    result = []
    for name in given:
        if not isinstance(name, str):
            raise DataError(f"{where}: expected class names as text, found {name!r}")
        text = normal_class_name(name, where)
        key = class_key(text)
        if key in seen and not allow_duplicates:
            raise DataError(
                f"{where}: the class names {seen[key]!a} and {name!a} are the same text after Unicode "
                "normalisation; merge the two classes or rename one"
            )
        seen[key] = name
        result.append(text)
    return tuple(result)


def safe_relative(path: str, where: str) -> str:
    """``path`` with forward slashes and without "." parts, if it stays inside the folder it is relative to.

    Raises:
        DataError: absolute paths, drive letters, ".." parts, NUL, empty or undecodable names.
    """
    why = None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        why = "is empty"
    elif path.startswith(("/", "\\")) or _DRIVE.match(path):
        why = "is absolute"
    elif any(part == ".." for part in path.replace("\\", "/").split("/")):
        why = "leaves the folder of the data set"
    elif "\0" in path:
        why = "has a NUL character"
    else:
        try:
            path.encode()
        except UnicodeEncodeError:
            why = "is not valid UTF-8"
    if why:
        raise DataError(f"{where}: the path {path!r} {why}; expected a path relative to, and inside, that folder")
    return "/".join(parts)


def is_inside(path: str | Path, roots: Sequence[str]) -> bool:
    """Whether ``path``, all links resolved, lies in one of ``roots`` (already resolved)."""
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
