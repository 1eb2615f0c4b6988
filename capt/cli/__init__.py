"""The ``capt`` command: finds the verb, runs it, and turns errors into one clear line and an exit code.

Nothing heavy is imported before the verb is known, so ``capt --help`` answers at once. Every verb is one plain
function; tyro makes its options from the signature.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from capt.errors import CaptError

INTERRUPTED = 130


class Verb(NamedTuple):
    """Where a verb is written, and what it does in one line."""

    module: str
    function: str
    help: str


VERBS = {
    "doctor": Verb("capt.cli.inspect", "doctor", "what works on this machine: torch, kernels, packages, model, memory"),
    "demo": Verb("capt.cli.fit", "demo", "CAPT on the shipped images with the shipped model: table and report"),
    "fit capt": Verb("capt.cli.fit", "fit_capt", "train CAPT on a few images a class and evaluate base, novel, HM"),
    "fit msci": Verb("capt.cli.fit_compositional", "fit_msci", "MSCI: (state, object) pairs never seen together"),
    "fit csp": Verb("capt.cli.fit_compositional", "fit_csp", "CSP: one learned embedding a state and an object"),
    "fit cprfl": Verb("capt.cli.fit_multi_label", "fit_cprfl", "CPRFL: any number of labels an image, some rare"),
    "fit linear-labels": Verb(
        "capt.cli.fit_multi_label", "fit_linear_labels", "a linear classifier of any number of labels an image"
    ),
    "fit coop": Verb("capt.cli.fit", "fit_coop", "CoOp: learn the text context"),
    "fit ivlp": Verb("capt.cli.fit", "fit_ivlp", "independent prompts in both towers"),
    "fit promptsrc": Verb("capt.cli.fit", "fit_promptsrc", "prompts in both towers, kept near the frozen model"),
    "fit promptkd": Verb("capt.cli.fit", "fit_promptkd", "distil a teacher into prompts, without labels"),
    "fit tip-adapter": Verb("capt.cli.fit", "fit_tip_adapter", "a cache of the training features"),
    "fit linear-probe": Verb("capt.cli.fit", "fit_linear_probe", "a linear classifier started from the class texts"),
    "fit dpc": Verb("capt.cli.fit", "fit_dpc", "what CAPT's published code computes (DPC-style)"),
    "ablate": Verb("capt.cli.ablate", "ablate", "what each part of CAPT contributes, and controls: table and figure"),
    "evaluate": Verb("capt.cli.use", "evaluate", "evaluate a finished run on a data set"),
    "predict": Verb("capt.cli.use", "predict", "classify images: class and what it is confused with, pair, or labels"),
    "bank build": Verb("capt.cli.bank", "build", "collect the mistakes of a CLIP model on labelled images"),
    "bank search": Verb("capt.cli.bank", "search", "top confusion pairs of a bank, or the mistakes most like an image"),
    "bias measure": Verb("capt.cli.bias", "measure", "is the model cross-eyed? objects at a grid of positions"),
    "bias explain": Verb("capt.cli.bias", "explain", "where in the network an off-center object is lost"),
    "bias mitigate": Verb("capt.cli.bias", "mitigate", "what helps without training, tested on held-out objects"),
    "data check": Verb("capt.cli.data", "check", "read a data set and say what is in it and what is wrong"),
    "data few-shot": Verb("capt.cli.data", "few_shot", "choose k training images a class and save the list"),
    "data pair-texts": Verb(
        "capt.cli.data_pair_texts", "pair_texts", "ask for texts about pairs of classes, and check the answers"
    ),
    "report": Verb("capt.cli.use", "report", "write the HTML report of a run"),
}


def usage() -> str:
    """The text of ``capt --help``."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:<{width}}{verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: capt VERB [OPTIONS]      capt VERB --help      capt --version",
            "",
            "Finds what a CLIP model confuses, and trains it to tell those apart.",
            "",
            *lines,
            "",
            "DATA is 'emoji' (shipped), a folder with one sub-folder a class, a CSV or JSONL list, 'coop:<data set>'",
            "with --root, or WebDataset shards; for 'fit msci' and 'fit csp' 'emoji-pairs' (shipped), a list with the",
            "columns path, state, object and split, or 'czsl:<data set>' with --root; for 'fit cprfl' and 'fit",
            "linear-labels' 'clipart' (shipped), a list with the columns path, labels and split, or 'coco-lt' or",
            "'voc-lt' with --root.",
            "--model is 'embedded' or 'embedded-vit' (shipped), an open_clip name with --pretrained TAG_OR_FILE, or",
            "hf:FOLDER for a transformers CLIP or SigLIP, or bias:RUN for a model that 'capt bias mitigate' changed.",
            "",
            "exit codes: 0 done, 2 usage, 3 data, 4 damaged file, 5 disk or memory, 6 not a number, 130 interrupted",
        ]
    )


def find_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split arguments into the verb (one or two words) and the rest.

    Raises:
        CaptError: there is no such verb; the message names the nearest one.
    """
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if len(arguments) >= words and name in VERBS:
            return name, list(arguments[words:])
    first = arguments[0]
    family = [name for name in VERBS if name.startswith(f"{first} ")]
    if family:
        raise CaptError(f"'capt {first}' needs one more word: {', '.join(f'capt {name}' for name in family)}")
    near = difflib.get_close_matches(first, [name.split()[0] for name in VERBS], 1)
    hint = f"did you mean 'capt {near[0]}'?" if near else "'capt --help' lists them"
    raise CaptError(f"unknown verb '{first}'; {hint}")


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit code, errors pass through."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else CaptError.exit_code
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"capt {version('capt')}")
        return 0
    name, rest = find_verb(arguments)
    verb = VERBS[name]
    function = getattr(importlib.import_module(verb.module), verb.function)
    import tyro

    return int(tyro.cli(function, prog=f"capt {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,)) or 0)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"capt: warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``capt`` command and of ``python -m capt``; returns the exit code."""
    # torch's OpenMP threads otherwise spin while they wait, which makes small models several times slower on
    # machines with few cores. The library reads the variable once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return run(sys.argv[1:] if arguments is None else arguments)
    except CaptError as error:
        print(f"capt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("capt: interrupted; what was written so far is complete", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `capt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
