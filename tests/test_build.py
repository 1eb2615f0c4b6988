"""What is built and what is shipped: sources, binaries, packaging, light imports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import capt
from capt import _build, doctor
from tests.conftest import CPU_LEVELS
from tests.native_build import CSRC, ROOT, run, sources

BINARIES = sorted((ROOT / "capt").glob("*.so")) or sorted(Path(capt.__file__).parent.glob("*.so"))


def test_every_native_source_is_listed_once():
    listed = [path for kind in ("simd", "cpu", "cuda", "torch", "python") for path in sources(kind)]
    present = {path for suffix in ("*.cpp", "*.cu") for path in CSRC.rglob(suffix)}
    assert len(listed) == len(set(listed)) and set(listed) == present


def test_kernels_include_no_torch_header_and_files_stay_short():
    for path in [*CSRC.rglob("*.c*"), *CSRC.rglob("*.h")]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 600, path
        if path.parent.name != "torch":
            assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', text), path
    for path in [*ROOT.glob("capt/ops/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "capt" / "reference.py"]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_native_library_is_loaded_and_describes_itself():
    native = _build.native()
    assert native.loaded, native.reason
    assert native.cpu_level in CPU_LEVELS and native.compiler
    from capt import _C

    assert _C.build_info()["version"] == capt.__version__
    assert _C.cpu_levels()[-1] == native.cpu_level
    if native.cuda:
        assert "80-virtual" in native.cuda_archs or "90a" in native.cuda_archs


def test_binaries_hold_no_path_of_the_build_machine():
    assert len(BINARIES) == 2
    for binary in BINARIES:
        text = binary.read_bytes()
        for path in (str(ROOT), sys.prefix, "/home/", "/tmp/", "site-packages"):
            assert path.encode() not in text, f"{binary.name} contains '{path}'"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_binaries_have_no_search_path_and_few_needs():
    for binary in BINARIES:
        dynamic = run(["readelf", "-d", binary]).stdout
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
        needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
        assert not {name for name in needed if re.search(r"cuda|python|c10|libtorch(?!_cpu)", name)}, needed
        symbols = run(["nm", "-D", "--defined-only", binary]).stdout
        names = [line.split()[-1] for line in symbols.splitlines() if " T " in line]
        assert not [name for name in names if name.startswith(("capt_", "cuda"))], names


def test_version_and_packages_agree_with_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == capt.__version__
    assert any(requirement.startswith("torch") for requirement in project["build-system"]["requires"])
    core = {re.split(r"[<>=]", name)[0] for name in project["project"]["dependencies"]}
    assert core == {"torch", "numpy", "safetensors", "tyro", "rich"}
    from capt import kernels

    assert Path(kernels.__file__ or "").name == "__init__.py"


def test_import_is_light():
    heavy = (
        "open_clip",
        "PIL",
        "torchvision",
        "transformers",
        "jinja2",
        "matplotlib",
        "timm",
        "capt.kernels.grid_adapter",
    )
    code = f"import sys, capt, capt.ops; print([name for name in {heavy!r} if name in sys.modules])"
    assert run([sys.executable, "-c", code], cwd=ROOT).stdout.strip() == "[]"


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = capt.nonsense
    assert "ops" in dir(capt) and capt.ops.BACKENDS[0] == "reference"


def configure(folder: Path, *definitions: str) -> subprocess.CompletedProcess[str]:
    """Only the configuring step of CMake, with a compiler path that holds no nvcc."""
    import pybind11

    empty = folder / "bin"
    empty.mkdir()
    for tool in ("cmake", "ninja", "c++", "g++", "cc", "ld", "ar", "ranlib", "as", "nm", "strip", "objdump"):
        found = shutil.which(tool)
        if found:
            (empty / tool).symlink_to(found)
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja",
               f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
               *definitions]  # fmt: skip
    environment = {"PATH": str(empty), "HOME": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("ninja") is None, reason="cmake and ninja are not installed"
)


@needs_cmake
def test_cuda_required_without_nvcc_is_an_error(tmp_path):
    done = configure(tmp_path, "-DCAPT_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert done.returncode != 0 and "no CUDA compiler was found" in done.stderr


@needs_cmake
def test_cuda_is_optional_and_settings_are_checked(tmp_path):
    (tmp_path / "a").mkdir()
    done = configure(tmp_path / "a", "-DCAPT_CUDA=AUTO", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert done.returncode == 0 and "CUDA kernels OFF" in done.stdout
    (tmp_path / "b").mkdir()
    done = configure(tmp_path / "b", "-DCAPT_CUDA=MAYBE")
    assert done.returncode != 0 and "use AUTO, ON or OFF" in done.stderr


def setup_py(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path / 'b'}"]
    variables = {"PATH": str(tmp_path), "HOME": str(tmp_path), **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_without_tools_a_pure_python_package_is_built(tmp_path):
    done = setup_py(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no native kernels are built (not found: cmake, ninja, a C++ compiler)" in done.stderr
    built = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert built and not [path for path in built if path.suffix == ".so"]
    assert any(path.parts[-2:] == ("kernels", "grid_adapter.py") for path in built)


WITHOUT_KERNELS = """
import json

import capt.errors
from capt import _build, doctor
from tests.test_bad_calls import RIGHT, call

assert not _build.native().loaded and _build.__file__.startswith(__import__("os").getcwd())
for op, arguments in RIGHT.items():
    call(op, arguments())
    try:
        call(op, {**arguments(), "backend": "cpu"})
    except capt.errors.CaptError as error:
        assert "was not built" in str(error), error
    else:
        raise AssertionError(op)
print(json.dumps([finding.as_dict() for finding in doctor.examine()]))
"""


def test_the_pure_python_package_works_and_doctor_says_what_is_missing_and_what_it_costs(tmp_path):
    done = setup_py(tmp_path, CAPT_NATIVE="OFF")
    assert done.returncode == 0 and "no native kernels are built (CAPT_NATIVE=OFF)" in done.stderr
    library = next((tmp_path / "b").glob("lib*"))
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "0"}
    found = json.loads(run([sys.executable, "-c", WITHOUT_KERNELS], cwd=library, env=environment).stdout)
    by_name = {finding["name"]: finding for finding in found if finding["topic"] == "kernels"}
    assert "was not built" in by_name["native library"]["text"]
    assert by_name["build tools"]["text"].startswith("not found: cmake, ninja, a C++ compiler")
    assert by_name["nvcc"]["status"] == "missing"
    for op in doctor.EXAMPLE_SHAPES:
        assert by_name[op]["status"] == "missing" and "reference, slower than a kernel" in by_name[op]["text"]
    assert re.search(r"took \d+% of the time of the best alternative", by_name["grid_adapter"]["text"])
    assert all(finding["status"] != "broken" for finding in found), found


def test_doctor_shows_the_backend_of_every_op(monkeypatch):
    shown = {finding.name: finding for finding in doctor.examine() if finding.topic == "kernels"}
    for op in doctor.EXAMPLE_SHAPES:
        assert shown[op].status == "ok" and shown[op].text.startswith(("cpu: ", "cuda: ", "triton: "))
    monkeypatch.setattr(doctor, "SPEED", Path("absent.json"))
    assert doctor._cost("grid_adapter") == ""


def test_required_native_build_without_tools_fails(tmp_path):
    done = setup_py(tmp_path, CAPT_NATIVE="ON")
    assert done.returncode != 0 and "required, but not found: cmake, ninja" in done.stderr
    done = setup_py(tmp_path, CAPT_CUDA="PERHAPS")
    assert done.returncode != 0 and "use AUTO, ON or OFF" in done.stderr


def test_a_library_that_does_not_load_becomes_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "capt_ops.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_build, "LIBRARY", broken)
    state = _build.native.__wrapped__()
    assert not state.loaded and "does not load with torch" in state.reason
    monkeypatch.setattr(_build, "LIBRARY", tmp_path / "absent.so")
    assert "was not built" in _build.native.__wrapped__().reason
