"""Traced graphs as source text, and the files that keep them between processes."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import platform
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from tunebench.engine.rewrites import constants_as_inputs

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "nequip", "nequip-allegro", "e3nn", "tunebench")

# Operations under the names by which torch calls them with less ado than through `torch.ops`: a traced step of a
# small model on a CPU is a thousand calls of a few microseconds each.
_QUICK = {
    "add.Tensor": "torch.add",
    "bmm.default": "torch.bmm",
    "cat.default": "torch.cat",
    "constant_pad_nd.default": "torch.constant_pad_nd",
    "div.Tensor": "torch.div",
    "expand.default": "torch.Tensor.expand",
    "gather.default": "torch.gather",
    "mm.default": "torch.mm",
    "mul.Tensor": "torch.mul",
    "neg.default": "torch.neg",
    "permute.default": "torch.permute",
    "pow.Tensor_Scalar": "torch.pow",
    "reshape.default": "torch.reshape",
    "scatter_add.default": "torch.scatter_add",
    "select.int": "torch.select",
    "sigmoid.default": "torch.sigmoid",
    "sub.Tensor": "torch.sub",
    "sum.dim_IntList": "torch.sum",
    "where.self": "torch.where",
}
_CALL = re.compile(r"torch\.ops\.aten\.(\w+\.\w+)\(")

# What the source of a traced graph refers to.
_NAMES = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}


@dataclass(frozen=True, eq=False)
class GraphSource:
    """A functional graph as Python source, with the tensors that it holds; calls like the graph it came from.

    Attributes:
        code: a function ``forward(self, *inputs, *constants)`` that returns a list of tensors.
        constants: tensors that follow the inputs.
        nodes: operations and inputs in the graph.
    """

    code: str
    constants: tuple[torch.Tensor, ...]
    nodes: int

    @classmethod
    def of(cls, module: GraphModule) -> GraphSource:
        """The source of a graph, whose held tensors become inputs in place."""
        constants = constants_as_inputs(module)
        return cls(code=module.code, constants=constants, nodes=len(module.graph.nodes))

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> GraphSource:
        """The inverse of `to_plain`."""
        return cls(code=plain["code"], constants=tuple(plain["constants"]), nodes=plain["nodes"])

    def to_plain(self) -> dict[str, Any]:
        """Text, tensors and numbers only."""
        return {"code": self.code, "constants": list(self.constants), "nodes": self.nodes}

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The graph's outputs."""
        return self._forward(None, *inputs, *self.constants)

    @cached_property
    def _forward(self) -> Callable[..., list[torch.Tensor]]:
        return forward_of(_CALL.sub(lambda call: f"{_QUICK[call[1]]}(" if call[1] in _QUICK else call[0], self.code))


def forward_of(code: str) -> Callable[..., list[torch.Tensor]]:
    """The function ``forward(self, *tensors)`` that the code of a graph defines."""
    scope: dict[str, Any] = dict(_NAMES)
    exec(compile(code, "<traced graph>", "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]


def graph_key(*parts: object) -> str:
    """SHA-256 over parts with a stable text, the versions of all packages that a graph depends on and this code."""
    packages = [(name, version(name)) for name in _PACKAGES]
    return hashlib.sha256(repr((parts, packages, platform.python_version(), _code_digest())).encode()).hexdigest()


def tensor_layouts(tensors: Sequence[torch.Tensor]) -> list[tuple[object, ...]]:
    """Shape, strides, type and device of each tensor, as parts of a key."""
    return [(tuple(t.shape), t.stride(), str(t.dtype), _device_name(t.device)) for t in tensors]


@dataclass(frozen=True)
class GraphStore:
    """Files of one key in a folder that processes share; each begins with the SHA-256 of its content.

    Files appear whole or not at all. One that cannot be read is reported and taken as missing, one that cannot be
    written is reported: both cost time only.

    Attributes:
        folder: where the files lie; without it nothing is kept.
    """

    folder: Path | None
    key: str

    def read(self, kind: str) -> bytes | None:
        """The content of a file; None where there is none that is whole."""
        path = self._path(kind)
        if path is None or not path.is_file():
            return None
        content = path.read_bytes()
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            self.refuse(kind, ValueError("its content does not match its checksum"))
            return None
        return body

    def write(self, kind: str, body: bytes) -> None:
        """Keep a file."""
        if self.folder is None:
            return
        try:
            with self.scratch(kind) as scratch:
                scratch.write_bytes(hashlib.sha256(body).digest() + body)
                scratch.replace(self.folder / f"{self.key}.{kind}")
        except OSError as error:  # a full disk costs the next start its time, not this one
            self.not_kept(kind, error)

    def read_plain(self, kind: str) -> dict[str, Any] | None:
        """A kept dictionary of tensors, text and numbers; None where there is none that can be read."""
        content = self.read(kind)
        if content is None:
            return None
        try:
            return torch.load(io.BytesIO(content), weights_only=True)  # type: ignore[no-any-return]
        except Exception as error:  # torch.load raises whatever a foreign file makes of its parsers
            self.refuse(kind, error)
            return None

    def write_plain(self, kind: str, plain: dict[str, Any]) -> None:
        """Keep a dictionary of tensors, text and numbers."""
        content = io.BytesIO()
        torch.save(plain, content)
        self.write(kind, content.getvalue())

    def forget(self, kind: str) -> None:
        """Remove a kept file."""
        if path := self._path(kind):
            path.unlink(missing_ok=True)

    @contextmanager
    def scratch(self, kind: str) -> Iterator[Path]:
        """A path of this process alone, beside the files."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{self.key}.{kind}.{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def refuse(self, kind: str, error: Exception) -> None:
        """Say that a file cannot be read."""
        log.warning("%s: made anew, %s", self._path(kind), one_line(error))

    def not_kept(self, kind: str, error: Exception) -> None:
        """Say that a file cannot be written."""
        log.warning("%s: not kept, %s", self._path(kind), one_line(error))

    def _path(self, kind: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.key}.{kind}"


def one_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """SHA-256 of the code that makes the graphs."""
    folder = Path(__file__).parent
    names = ("compile_part.py", "divided.py", "functional.py", "fused.py", "graph_store.py", "loss.py", "rewrites.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
