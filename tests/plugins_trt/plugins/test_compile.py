"""Kernels compiled ahead of time, plans turned into C++, and ``lvlm-build plugins``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_plugin import EXAMPLE, add, gather

from lvlm.core import cmake
from lvlm.core.errors import BuildError, ParameterError
from lvlm.core.progress import Progress
from lvlm.plugins_trt import build_cli
from lvlm.plugins_trt.plugins import library_build
from lvlm.plugins_trt.plugins.architectures import ALONE, SHARED_LIMIT, parse_architectures
from lvlm.plugins_trt.plugins.kernel_compiler import (
    Image,
    added_pointers,
    cache_folder,
    compile_kernels,
    within_shared_memory,
)
from lvlm.plugins_trt.plugins.kernels import all_kernels, variants
from lvlm.plugins_trt.plugins.plugin_plan import (
    FLOATS,
    Attribute,
    Plugin,
    PluginStep,
    Scalar,
    Scratch,
)
from lvlm.plugins_trt.plugins.sizes import extent
from lvlm.plugins_trt.plugins.sources import write_sources

QUIET = Progress(1, quiet=True)
COUNT = [k for k in all_kernels([EXAMPLE]) if k.function == "count_up"]


def with_step(step: PluginStep, **changes: Any) -> Plugin:
    return replace(EXAMPLE, steps=(step,), **changes)


def test_architectures() -> None:
    assert parse_architectures(["sm_90a", " 8.7 ", "87", "120"]) == [87, 90, 120]
    with pytest.raises(ParameterError, match="unknown architecture '88'; did you mean 89"):
        parse_architectures(["88"])
    with pytest.raises(ParameterError, match="unknown architecture 'orin'; known: 100, "):
        parse_architectures(["orin"])
    assert {80, 86, 89} == set(SHARED_LIMIT) - ALONE


def test_a_step_comes_in_types_and_blocks() -> None:
    found = {(v.data, v.block) for v in variants(EXAMPLE, EXAMPLE.steps[0])}
    assert found == {(data, block) for data in FLOATS for block in (16, 64)}
    (plain,) = variants(EXAMPLE, EXAMPLE.steps[2])
    assert (plain.data, plain.block) == (None, None)
    assert plain.kernel.parameters == ("*fp32", "*fp32", "i32")
    names = [str(kernel) for kernel in all_kernels([EXAMPLE], ("bfloat16",))]
    assert names == [
        "example_plugin.gather bf16 BLOCK_D=16",
        "example_plugin.gather bf16 BLOCK_D=64",
        "example_plugin.scale bf16 BLOCK_D=64",
        "example_plugin.count_up BLOCK=64",
        "example_plugin.add BLOCK=64",
    ]
    assert all_kernels([EXAMPLE, replace(EXAMPLE, name="Another")]) == all_kernels([EXAMPLE])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": ("bias",)}, "gather has the parameters source, .* the plan gives 1 and the"),
        ({"constants": {"BLOCKS": 4}}, "the constants BLOCKS, BLOCK_D"),
        ({"arguments": ("source", "index", "lines")}, "takes lines, which is no tensor"),
        ({"arguments": (Scalar("mode"),)}, "takes mode, which is no number"),
    ],
)
def test_plans_that_do_not_fit_their_kernel(change: dict[str, Any], message: str) -> None:
    plugin = with_step(replace(EXAMPLE.steps[0], **change))
    with pytest.raises(BuildError, match=f"^Example: gather .*{message}|^Example: .*{message}"):
        all_kernels([plugin])


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cubin for each architecture, PTX of the lowest that later ones can run; compiled once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = compile_kernels(COUNT, [86, 90], jobs=2, progress=QUIET)
    cubin, own, ptx = compiled[COUNT[0]]
    assert [(i.arch, i.ptx) for i in (cubin, own, ptx)] == [(86, False), (90, False), (86, True)]
    assert cubin.code[:4] == own.code[:4] == b"\x7fELF"
    assert (cubin.entry, cubin.threads, cubin.shared) == ("count_up", 128, 0)
    text = ptx.code.decode()
    assert re.search(r"\.version 8\.0\n\.target sm_86\n", text)
    assert text.endswith("\0")
    assert len(re.findall(r"count_up_param_\d+,?\n", text)) == 3 + ptx.extras
    assert not [i for i in (cubin, own, ptx) if str(Path(__file__).parent).encode() in i.code]
    files = {file: file.stat().st_mtime_ns for file in cache_folder().rglob("*.cubin")}
    assert compile_kernels(COUNT, [86, 90], jobs=1, progress=QUIET) == compiled
    assert {file: file.stat().st_mtime_ns for file in cache_folder().rglob("*.cubin")} == files
    assert len(files) == 2


def test_ptx_where_no_architecture_has_any() -> None:
    compiled = compile_kernels(COUNT, [90], jobs=1, progress=QUIET)
    assert [(i.arch, i.ptx) for i in compiled[COUNT[0]]] == [(90, False), (80, True)]


def test_a_kernel_that_does_not_compile() -> None:
    """Its pointers' types do not: a plan's mistake that only the compiler sees."""
    (kernel,) = (
        replace(k, signature=tuple((n, "*i64" if n == "source" else t) for n, t in k.signature))
        for k in all_kernels([EXAMPLE], ("float32",))
        if k.function == "gather" and ("BLOCK_D", 16) in k.constants
    )
    broken = replace(kernel, constants=(("BLOCK_D", 17),))
    with pytest.raises(
        BuildError, match=r"^example_plugin.gather BLOCK_D=17 for sm_87: .*power of"
    ):
        compile_kernels([broken], [87], jobs=1, progress=QUIET)


@pytest.mark.parametrize(
    ("arch", "ptx", "shared", "message"),
    [
        (86, False, (99 << 10) + 1, "sm_86 has 101,376"),
        (90, False, (227 << 10) + 1, "sm_90 has 232,448"),
        (80, True, (99 << 10) + 1, "some GPU has 101,376"),
    ],
)
def test_too_much_shared_memory(arch: int, ptx: bool, shared: int, message: str) -> None:
    image = Image(arch, ptx, b"", "count_up", 128, shared, 2)
    fitting = replace(image, shared=shared - 1)
    assert within_shared_memory((fitting, fitting), COUNT[0], arch) == (fitting, fitting)
    with pytest.raises(BuildError, match=f"count_up BLOCK=64 needs .* shared memory; {message}"):
        within_shared_memory((image, image), COUNT[0], arch)


def test_parameters_are_read_from_the_code() -> None:
    entry = ".visible .entry k(\n\t.param .u64 .ptr .global k_0,\n\t.param .{}32 k_1{}\n)\n"
    assert added_pointers(entry.format("f", ""), ["*fp16", "fp32"]) == 0
    assert added_pointers(entry.format("u", ",\n\t.param .u64 k_2"), ["*fp16", "i32"]) == 1
    for given in (["*fp16"], ["*fp16", "i32", "i32"], ["i32", "*fp16"]):
        with pytest.raises(BuildError, match="its parameters have"):
            added_pointers(entry.format("u", ""), given)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (
            replace(EXAMPLE, scratch=(Scratch("s", "int8", (extent("bias", 0) - 1,)),)),
            "Example: a scratch buffer may not shrink",
        ),
        (with_step(replace(EXAMPLE.steps[0], grid=())), "Example: a grid has one to three"),
        (
            replace(EXAMPLE, attributes=(Attribute("n", int, 2**31),), variant=None),
            "Example: n: 2147483648 is no int32",
        ),
        (replace(EXAMPLE, name="Exämple"), "'Exämple' is no name"),
    ],
)
def test_plans_that_the_library_cannot_follow(plugin: Plugin, message: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=message):
        write_sources(tmp_path, [replace(plugin, steps=plugin.steps[:1])], {})


def test_what_was_not_compiled_is_not_in_the_tables(tmp_path: Path) -> None:
    kernel = all_kernels([with_step(EXAMPLE.steps[3])])[0]
    assert kernel.function == add.fn.__name__ != gather.fn.__name__
    images = (
        Image(87, False, b"cubin", "add", 128, 0, 2),
        Image(87, True, b"ptx\0", "add", 128, 0, 2),
    )
    write_sources(tmp_path, [EXAMPLE], {kernel: images})
    text = (tmp_path / "tables.cpp").read_text()
    assert "example_plugin.add" in text
    assert "gather" not in text
    assert (tmp_path / "kernels.bin").read_bytes() == b"cubin".ljust(64, b"\0") + b"ptx\0"


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    try:
        status = build_cli.main(list(arguments))
    except SystemExit as exit:
        status = int(exit.code or 0)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: WHAT"),
        (["plugin"], "invalid choice: 'plugin'"),
        (["plugins", "-o", "x"], "the following arguments are required: --arch"),
        (["plugins", "--arch", "88", "-o", "x"], "unknown architecture '88'; did you mean 89"),
        (["plugins", "--arch", "87", "-o", "x", "--jobs", "0"], "--jobs is 0; at least 1"),
        (["plugins", "--arch", "87", "-o", "x", "--cpu"], "unknown argument --cpu"),
        (
            ["plugins", "--arch", "87", "-o", "x", "--tensorrt-root", "/nowhere"],
            "--tensorrt-root /nowhere: there is no include/NvInferRuntime.h in it",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = command(capsys, *arguments)
    assert status == 2
    assert message in error
    assert error.startswith("lvlm-build")
    assert error.count("\n") == 1


def test_a_place_that_cannot_be_written_is_known_before_minutes_of_compiling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_build, "compile_kernels", lambda *_, **__: pytest.fail("compiled"))
    (tmp_path / "file").write_text("")
    status, error = command(capsys, "plugins", "--arch", "87", "-o", str(tmp_path / "file"))
    assert status == 2
    assert "file/source cannot be written: Not a directory" in error


def test_headers_are_looked_for_before_minutes_of_compiling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_build, "compile_kernels", lambda *_, **__: pytest.fail("compiled"))
    shell = tmp_path / "shell"
    shutil.copytree(library_build.SHELL, shell)
    script = shell / "CMakeLists.txt"
    text = script.read_text().replace("NvInferRuntime.h HINTS", "NoSuchFile.h HINTS")
    script.write_text(text)  # this machine may have it
    monkeypatch.setattr(library_build, "SHELL", shell)
    status, error = command(capsys, "plugins", "--arch", "87", "-o", str(tmp_path / "out"))
    assert status == 2
    assert "no TensorRT headers; give --tensorrt-root, the folder with include/NvInferR" in error
    assert "libnvinfer-headers-dev" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("CXX", "/nowhere/c++")
    status, error = command(capsys, "plugins", "--arch", "87", "-o", str(tmp_path / "out"))
    assert status == 2
    assert "cmake failed: " in error
    assert error.count("\n") == 1


def test_sources_to_build_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = with_step(EXAMPLE.steps[2])
    monkeypatch.setattr("lvlm.plugins_trt.plugins.registry.plugins", lambda: {"Example": small})
    status, error = command(
        capsys, "plugins", "--arch", "86", "-o", str(tmp_path), "--sources-only", "--jobs", "1"
    )
    assert (status, error.count("\n")) == (0, 2)
    assert "compile 1 kernels for sm_86" in error
    names = {file.name for file in (tmp_path / "source").iterdir()}
    assert names == {f.name for f in library_build.SHELL.iterdir()} | {"tables.cpp", "kernels.bin"}


def test_what_building_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (library_build.SHELL / "CMakeLists.txt").read_text()
    text = text.replace("NvInferRuntime.h HINTS", "NoSuchFile.h HINTS")  # this machine may have it
    (tmp_path / "CMakeLists.txt").write_text(text)
    headers = library_build.Headers(tmp_path / "no-tensorrt")
    with pytest.raises(BuildError) as raised:
        library_build.run_cmake(tmp_path, tmp_path / "build", "lvlm_plugins", headers, 1)
    assert "no TensorRT headers; give --tensorrt-root" in str(raised.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match="cmake is not installed; pip install cmake"):
        cmake.check_tools()


def test_help_is_quick() -> None:
    """Nothing heavy is imported before it is needed."""
    code = """
import sys
from lvlm.plugins_trt import build_cli
try:
    build_cli.main(["plugins", "--help"])
except SystemExit:
    pass
print(sorted({"torch", "triton", "onnx", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--sources-only" in done.stdout
