"""Native: few tokens a row on a CPU, as in decoding, by a compiled loop that reads each lane's matrices once, as a stream.

The loop is C++ of ours and has to be compiled once on each machine, by ``compile_rows`` or ``deltatune operators compile``. It is
used from then on; without it, ``Gather`` does the same more slowly.
"""

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

from deltatune.backbones.gguf import cache_folder
from deltatune.errors import OutputError, Unsupported
from deltatune.multi.lanes import Lanes, Shortcut
from deltatune.multi.operators.operator import Operator

SOURCE = Path(__file__).with_name("rows.cpp")

FLAGS = {"AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
"""Of the compiler, by what torch says of the processor."""


class Native(Operator):
    """One call a product or pair, in which nothing is copied; rows without a delta are skipped in a pair."""

    @staticmethod
    @functools.cache
    def is_available() -> bool:
        """It was compiled for this torch and this kind of processor."""
        if hasattr(torch.ops.deltatune, "add_pairs_"):
            return True
        file = compiled_file()
        if file.exists():
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        return file.exists()

    @staticmethod
    def fits(x: Tensor, W: Tensor) -> bool:
        """These tensors are what the loop reads: numbers of 32 bits, in order, on the CPU, and nobody else's."""
        plain = x.is_cpu and x.dtype == W.dtype == torch.float32 and W.is_contiguous()
        return plain and torch._C._functorch.maybe_current_level() is None

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        z = x.new_zeros(*x.shape[:-1], lanes[W].shape[-1])
        torch.ops.deltatune.add_rows_(z, x.contiguous(), lanes[W], lanes.picks.lanes)
        return z

    def pair(self, x: Tensor, lanes: Lanes, A: str, B: str) -> Tensor:
        """(x A) B; the zero lane of a pair is zeros."""
        z = x.new_zeros(*x.shape[:-1], lanes[B].shape[-1])
        torch.ops.deltatune.add_pairs_(z, x.contiguous(), lanes[A], lanes[B], lanes.picks.lanes)
        return z

    def shortcut(self, y: Tensor, lanes: Lanes, A: str, B: str) -> Shortcut | None:
        """The loop, into y itself."""
        if not self.fits(y, lanes[B]):
            return None
        add, down, up, each = torch.ops.deltatune.add_pairs_.default, lanes[A], lanes[B], lanes.picks.lanes
        return lambda x, y: add(y, x.contiguous(), down, up, each)


def compiled_file() -> Path:
    """Where the loop lies once it is compiled; another torch, another processor and another source have another file."""
    content = [SOURCE.read_text(encoding="utf-8"), torch.__version__, torch.backends.cpu.get_cpu_capability(), sys.platform]
    return cache_folder() / "operators" / f"rows-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}.so"


def compile_rows() -> Path:
    """Compile the loop for this machine, if it is not yet; half a minute.

    Returns:
        The library's file.

    Raises:
        Unsupported: there is no compiler here, or it fails.
        OutputError: the cache cannot be written.
    """
    target, compiler = compiled_file(), shutil.which(os.environ.get("CXX", "c++"))
    if target.exists():
        return target
    if compiler is None or sys.platform != "linux":
        found = "no C++ compiler was found (`c++`, or what `CXX` names)" if compiler is None else f"this is {sys.platform}"
        raise Unsupported(f"The operators are compiled on Linux with a C++ compiler, but {found}. Routing works without them, more slowly.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".rows-") as scratch:
            made = Path(scratch) / target.name
            for command in _commands(compiler, made):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise Unsupported(f"`{compiler}` could not compile the operators:\n{done.stderr.strip()}\nRouting works without them.")
            made.replace(target)
    except OSError as cause:
        raise OutputError(f"The operators could not be kept in `{target.parent}`: {cause.strerror}. Set DELTATUNE_CACHE.") from cause
    Native.is_available.cache_clear()
    return target


def _commands(compiler: str, target: Path) -> list[list[str]]:
    """Compile, then link. OpenMP's library is not linked: torch brings its own, and two would have threads in each other's way."""
    from torch.utils.cpp_extension import include_paths, library_paths

    objects = str(target.with_suffix(".o"))
    flags = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", *FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())]
    libraries = [part for path in library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return [
        [compiler, "-c", *flags, *(f"-I{path}" for path in include_paths()), str(SOURCE), "-o", objects],
        [compiler, "-shared", objects, *libraries, "-ltorch_cpu", "-lc10", "-o", str(target)],
    ]
