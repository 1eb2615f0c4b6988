"""What every file of the project keeps to: imports without side effects, documented names, no traces of a machine."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

import capt

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {".git", ".venv", "build", "dist", "runs", "site", "__pycache__", "capt.egg-info"}
CACHES = {".mypy_cache", ".pytest_cache", ".ruff_cache", ".benchmarks", ".hypothesis"}
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".hpp",
    ".html",
    ".css",
    ".json",
    ".yaml",
    ".yml",
    "",
}

# Written in pieces, so that this file does not match itself.
FORBIDDEN = {
    "a path of somebody's machine": re.compile(
        "/(" + "|".join(("ho" + "me", "ro" + "ot", "Us" + "ers", "tm" + "p", "wo" + "rk")) + r")/\w"
    ),
    "a path that leads out of the project": re.compile(r"\.\./" + "shared"),
    "the address of a package index": re.compile("--(extra-)?index" + "-url|https?://[^ ]*/sim" + "ple/"),
    "something unfinished": re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + "X)\\b|NotImplemented" + "Error"),
    "a test that never runs": re.compile(r"mark\.(sk" + r"ip|xf" + r"ail)\b"),
}


@functools.cache
def files() -> tuple[Path, ...]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(set(folders) - NOT_OURS - CACHES)
        relative = Path(folder).relative_to(ROOT)
        found += [relative / name for name in sorted(names) if not name.endswith((".so", ".pyc"))]
    return tuple(found)


def modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.walk_packages(capt.__path__, "capt.")]
    skipped = ("capt._C", "capt.capt_ops", "capt.__main__", "capt.kernels")
    return [importlib.import_module(name) for name in names if not name.startswith(skipped)]


def test_nothing_forbidden_is_written_anywhere() -> None:
    found = []
    for relative in files():
        if relative.suffix not in TEXT:
            continue
        for number, line in enumerate((ROOT / relative).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            found += [f"{relative}:{number}: {what}" for what, words in FORBIDDEN.items() if words.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "cd /ro" + "ot/x",
        "see ../sha" + "red/x",
        "# TO" + "DO later",
        "@pytest.mark.sk" + "ip(reason='')",
        "/ho" + "me/ann/x",
    ],
)
def test_forbidden_words_would_be_found(line: str) -> None:
    assert any(words.search(line) for words in FORBIDDEN.values())


def test_no_file_is_too_long_to_read() -> None:
    limits = {".py": 400, ".cpp": 600, ".cu": 600, ".cuh": 600, ".h": 600}
    long = []
    for relative in files():
        if relative.parts[0] in ("capt", "csrc", "kernels", "benchmarks", "scripts"):
            lines = len((ROOT / relative).read_bytes().splitlines()) if relative.suffix in limits else 0
            if lines > limits.get(relative.suffix, 0):
                long.append(f"{relative}: {lines} lines")
    assert not long, long


def test_large_files_are_only_the_shipped_model_and_images() -> None:
    large = [str(path) for path in files() if (ROOT / path).stat().st_size > 1_000_000]
    assert all(name.startswith("capt/assets/") for name in large), large


def test_public_names_are_documented() -> None:
    missing = []
    for module in modules():
        if not module.__doc__:
            missing.append(module.__name__)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if not inspect.getdoc(value):
                missing.append(f"{module.__name__}.{name}")
            for member, method in vars(value).items() if inspect.isclass(value) else ():
                is_method = inspect.isfunction(method) or isinstance(method, property | classmethod | staticmethod)
                if is_method and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                    missing.append(f"{module.__name__}.{name}.{member}")
    assert not missing, "\n".join(missing)


def test_public_names_exist() -> None:
    for name in capt.__all__:
        assert getattr(capt, name) is not None
    for module in modules():
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_every_file_beside_the_code_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["capt"]
    inside = [path.relative_to("capt") for path in files() if path.parts[0] == "capt" and path.suffix != ".py"]
    left_out = [str(path) for path in inside if not any(fnmatch(str(path), p.replace("**/*", "*")) for p in patterns)]
    assert not left_out, left_out


def test_extras_named_in_messages_exist() -> None:
    from capt import doctor

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(project["project"]["optional-dependencies"])
    assert {extra for _, _, extra in doctor.OPTIONAL.values()} <= extras
    calls = re.compile(r'MissingDependencyError\(\s*"[^"]+",\s*f?"[^"]+",\s*"([^"]+)"')
    named = {m for path in files() if path.parts[0] == "capt" and path.suffix == ".py"
             for m in calls.findall((ROOT / path).read_text(encoding="utf-8"))}  # fmt: skip
    assert named and named <= extras


IMPORT_EVERYTHING = """
import importlib.machinery, pkgutil, sys

OPTIONAL = {"open_clip", "PIL", "torchvision", "transformers", "timm", "jinja2", "matplotlib", "triton", "faiss"}
CORE = [name for name in ("torch", "numpy", "safetensors.torch", "tyro", "rich.console", "rich.table")]
for name in CORE:  # what they do at import is not our doing
    importlib.import_module(name)

finder = importlib.machinery.PathFinder
find = finder.find_spec
absent = lambda name, path=None, target=None: None if name.split(".")[0] in OPTIONAL else find(name, path, target)
finder.find_spec = staticmethod(absent)
for name in list(sys.modules):
    if name.split(".")[0] in OPTIONAL:
        del sys.modules[name]

def watch(event, args):
    if event.startswith("socket.") or event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.system"):
        raise AssertionError(f"import did {event} {args}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise AssertionError(f"import opened {args[0]} for writing")

sys.addaudithook(watch)
import capt
names = [info.name for info in pkgutil.walk_packages(capt.__path__, "capt.")]
for name in names:
    if not name.startswith(("capt._C", "capt.capt_ops", "capt.__main__", "capt.kernels")):
        importlib.import_module(name)
for name in capt.__all__:
    getattr(capt, name)
print(len(names))
"""


def test_import_needs_only_the_core_packages_and_touches_neither_network_nor_disk() -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_EVERYTHING], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_import_capt_alone_is_quick() -> None:
    program = "import sys, capt; print(sorted({'torch', 'numpy', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
