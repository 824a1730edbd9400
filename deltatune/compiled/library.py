"""The library of loops: compiled once on each machine, by ``deltatune operators compile``, and used from then on."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from deltatune.compiled.cache import cache_folder
from deltatune.errors import OutputError, Unsupported

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))

FLAGS = {"AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
"""Of the compiler, by what torch says of the processor."""


@functools.cache
def is_compiled() -> bool:
    """The loops were compiled for this torch and this kind of processor; they are loaded then."""
    if hasattr(torch.ops.deltatune, "add_pairs_"):
        return True
    file = library_file()
    if file.exists():
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        _tell_shapes()
    return file.exists()


def _tell_shapes() -> None:
    """What the loops for training give, for tensors without numbers."""

    def forward(
        x: Tensor, W: list[Tensor], b: list[Tensor | None], A: list[Tensor], B: list[Tensor], s: list[float], folded: bool
    ) -> list[Tensor]:
        return [x.new_empty(*x.shape[:-1], one.shape[0]) for one in W]

    def backward(
        x: Tensor,
        W: list[Tensor],
        A: list[Tensor],
        B: list[Tensor],
        s: list[float],
        gradient: list[Tensor | None],
        folded: bool,
        needs_x: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return x.new_empty(x.shape if needs_x else (0,)), [torch.empty_like(one) for one in A], [torch.empty_like(one) for one in B]

    torch.library.register_fake("deltatune::low_rank_forward", forward)
    torch.library.register_fake("deltatune::low_rank_backward", backward)


def library_file() -> Path:
    """Where the library lies once it is compiled; another torch, another processor and other sources have another file."""
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    content = [*sources, torch.__version__, torch.backends.cpu.get_cpu_capability(), sys.platform]
    return cache_folder() / "compiled" / f"loops-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}.so"


def compile_library() -> Path:
    """Compile the loops for this machine, if they are not yet; half a minute.

    Returns:
        The library's file.

    Raises:
        Unsupported: there is no compiler here, or it fails.
        OutputError: the cache cannot be written.
    """
    target, compiler = library_file(), shutil.which(os.environ.get("CXX", "c++"))
    if target.exists():
        return target
    if compiler is None or sys.platform != "linux":
        found = "no C++ compiler was found (`c++`, or what `CXX` names)" if compiler is None else f"this is {sys.platform}"
        raise Unsupported(f"The operators are compiled on Linux with a C++ compiler, but {found}. All works without them, more slowly.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".loops-") as scratch:
            made = Path(scratch) / target.name
            for command in _commands(compiler, made):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise Unsupported(f"`{compiler}` could not compile the operators:\n{done.stderr.strip()}\nAll works without them.")
            made.replace(target)
    except OSError as cause:
        raise OutputError(f"The operators could not be kept in `{target.parent}`: {cause.strerror}. Set DELTATUNE_CACHE.") from cause
    is_compiled.cache_clear()
    return target


def _commands(compiler: str, target: Path) -> list[list[str]]:
    """Compile, then link. OpenMP's library is not linked: torch brings its own, and two would have threads in each other's way."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", *FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())]
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [part for path in library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    objects = {str(source): str(target.with_name(f"{source.stem}.o")) for source in SOURCES}
    compiling = [[compiler, "-c", *flags, *includes, source, "-o", made] for source, made in objects.items()]
    return [*compiling, [compiler, "-shared", *objects.values(), *libraries, "-ltorch_cpu", "-lc10", "-o", str(target)]]
