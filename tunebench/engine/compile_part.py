"""Graphs compiled by Inductor in processes of their own: ``python -m tunebench.engine.compile_part SOURCE ARTEFACT``.

Inductor compiles a graph in one thread of Python. No memory of a device is used, as the graphs' inputs are fake.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch._inductor import standalone_compile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tunebench.engine.graph_store import forward_of
from tunebench.study.processes import module_search_path, usable_cores


def compile_at_once(graphs: Sequence[GraphModule]) -> list[bytes]:
    """Inductor's artefacts of graphs that hold no tensors and whose inputs have fake ones (``meta["val"]``).

    Raises:
        ChildProcessError: a graph could not be compiled; the message ends with the last line that its process said.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        processes = []
        for place, graph in enumerate(graphs):
            processes.append(running.enter_context(_start(graph, Path(folder) / str(place), len(graphs))))
            running.callback(processes[-1].kill)  # of no effect on one that has ended
        return [_artefact(process, Path(folder) / str(place)) for place, process in enumerate(processes)]


def _start(graph: GraphModule, folder: Path, count: int) -> subprocess.Popen[bytes]:
    folder.mkdir()
    torch.save(_source(graph), folder / "source")
    threads = max(1, usable_cores() // count)
    environment = {"PYTHONPATH": module_search_path(), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    command = [sys.executable, "-m", __name__, str(folder / "source"), str(folder / "artefact")]
    with (folder / "said").open("wb") as said:
        return subprocess.Popen(command, env=os.environ | environment, stdout=said, stderr=said)


def _artefact(process: subprocess.Popen[bytes], folder: Path) -> bytes:
    if code := process.wait():
        lines = (folder / "said").read_text(errors="replace").strip().splitlines()
        raise ChildProcessError(f"exit code {code}, {lines[-1] if lines else 'no output'}")
    return (folder / "artefact").read_bytes()


def _source(graph: GraphModule) -> dict[str, Any]:
    """A graph as text and numbers."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return {
        "code": graph.code,
        "inputs": [(list(t.shape), list(t.stride()), t.dtype, str(t.device)) for t in inputs],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def _compiled(source: dict[str, Any]) -> Any:
    torch.set_float32_matmul_precision(source["matmul_precision"])
    torch.set_num_threads(source["threads"])
    forward = forward_of(source["code"])
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        inputs: list[Any] = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype, device in source["inputs"]
        ]
        graph = make_fx(lambda *tensors: forward(None, *tensors))(*inputs)
    outputs: Any = graph.graph.output_node().args[0]
    for node in outputs:
        node.meta["example_value"] = inputs[0]  # where Inductor looks for the mode of the inputs
    with torch.no_grad():
        return standalone_compile(graph, inputs, dynamic_shapes="from_graph")


def main() -> None:
    """Compile the graph in the file SOURCE to the file ARTEFACT."""
    source, artefact = sys.argv[1:]
    _compiled(torch.load(source, weights_only=True)).save(path=artefact)


if __name__ == "__main__":
    main()
