"""Export to ONNX: one evaluation of the network, or the whole sampler in one graph, checked in ONNX Runtime.

For the sampler's graph, one step is exported once and repeated with the constants of each step. Tracing N steps would
give the same nodes in N times the time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdiff.errors import VdiffError, require
from vdiff.files import write_whole
from vdiff.interop.graphs import GraphOptions, NetworkCall, Step, check, grid, inputs, largest_difference, metadata
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser
from vdiff.models.program import exported
from vdiff.replacing import Kind

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""The operator set of torch's exporter; it would convert to newer ones, which fewer programs read."""
MAX_BYTES = 2**31 - 2**24
"""The largest ONNX file: protocol buffers are limited to 2 GiB."""
BATCH = "batch"
MAX_BATCH = 63
"""The batch of the trace: layers of diffusers copy their input from 64 on. The graph has no limit."""
SMALL = 256
"""Weights with fewer values are never rounded."""


def _is_graph(path: Path) -> str:
    """The producer's name comes first in the file."""
    with open(path, "rb") as file:
        return BATCH if b"\x12\x05vdiff" in file.read(64) else ""


GRAPH = Kind("ONNX file", _is_graph)


def require_onnx() -> None:
    """Check that everything for the export is installed.

    Raises:
        VdiffError: a package is missing.
    """
    require("export to ONNX", "onnx", "onnx", "onnxruntime", "onnxscript")


def export_onnx(
    denoiser: Denoiser, config: CheckpointConfig, options: GraphOptions, path: Path, *, fingerprint: str
) -> float:
    """Write the graph to `path`, whole or not at all; returns the difference of ONNX Runtime's results to vdiff's.

    Inputs and outputs are those of `NetworkCall` and `FewSteps`, by name, for any batch size; it holds `metadata`.

    Raises:
        VdiffError: packages are missing, the network is too large for the format, the results differ, or the file
            system refuses.
    """
    require_onnx()
    import onnx

    size = sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values())
    if size > MAX_BYTES:
        raise VdiffError(
            f"{size / 2**30:.1f} GiB of weights exceed the 2 GiB limit of ONNX files", "use `vdiff export torch`"
        )
    if options.sampler:
        steps = grid(denoiser, options.num_steps)
        values = {**inputs(denoiser, options, config, range(2)), **steps[0]}
        step = _traced(Step(denoiser, options), {"z": values.pop("noise"), **values}, ["z_s"], fixed=list(steps[0]))
        constants = [{name: value.numpy() for name, value in one.items()} for one in steps]
        model = _repeated(step, constants, clip=config.space.limit is not None)
    else:
        model = _traced(
            NetworkCall(denoiser, options.output), inputs(denoiser, options, config, range(2)), [options.output]
        )
    _clean(model)
    if options.precision != "fp32":
        _store_rounded(model, options.precision)
    onnx.helper.set_model_props(model, metadata(denoiser, options, config, fingerprint))

    return _write(model, path, lambda answer: check(answer, denoiser, options, config))


def export_module(module: nn.Module, example: Mapping[str, Tensor], path: Path, precision: str) -> float:
    """Write a module of named inputs and one output as a graph, for any batch size; returns the largest difference.

    Args:
        example: inputs of two batches or more; the graph is compared on them, and on the first of them alone.
        precision: of the stored weights, as in `GraphOptions`.

    Raises:
        VdiffError: the results differ, or the file system refuses.
    """
    model = _traced(module, example, ["output"])
    _clean(model)
    if precision != "fp32":
        _store_rounded(model, precision)
    batches = [dict(example), {name: value[:1] for name, value in example.items()}]
    with torch.no_grad():
        pairs = [(values, module(**values)) for values in batches]
    return _write(model, path, lambda answer: largest_difference(answer, pairs, precision))


def _write(
    model: onnx.ModelProto, path: Path, compare: Callable[[Callable[[dict[str, Tensor]], Tensor]], float]
) -> float:
    """Write a graph whole or not at all; returns the result of `compare`, called with a function that runs it.

    If `compare` raises, no file is left.
    """
    import onnx

    def write(temporary: Path) -> float:
        onnx.save_model(model, temporary)
        onnx.checker.check_model(temporary, full_check=True)
        session = _session(str(temporary))

        def answer(named: dict[str, Tensor]) -> Tensor:
            return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in named.items()})[0])

        return compare(answer)

    return write_whole(path, write)


def _traced(
    module: nn.Module, example: Mapping[str, Tensor], output_names: list[str], fixed: Sequence[str] = ()
) -> Any:
    """The ONNX model of `module`, called by keyword; every input except those in `fixed` has a dynamic batch size."""
    module.eval().requires_grad_(False)
    with torch.no_grad(), _silenced(logging.getLogger("torch.onnx")):
        written = torch.onnx.export(
            exported(module, example, fixed, MAX_BATCH),
            input_names=list(example),
            output_names=output_names,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert written is not None
    return written.model_proto


def _repeated(step: onnx.ModelProto, steps: Sequence[Mapping[str, Any]], *, clip: bool) -> onnx.ModelProto:
    """A model that applies `step` with each of `steps`; z_s of one is z of the next: noise → images in [−1, 1].

    Values that depend only on weights are computed once. Values that also depend on `steps` (the time embedding,
    α and σ) are computed here and become constants of each step. Only the other nodes are repeated.

    Args:
        step: inputs z and the names in `steps`, which are the same for the whole batch, and others; output z_s.
        clip: whether the last z_s is clipped to [−1, 1]; latents have no limits.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = step.graph
    constant = {tensor.name for tensor in graph.initializer}
    by_step = set(steps[0])
    once, scalar, rest = [], [], []
    for node in graph.node:  # in the order of computation
        needs = set(filter(None, node.input))
        if needs <= constant:
            once.append(node)
            constant |= set(node.output)
        elif needs <= constant | by_step:
            scalar.append(node)
            by_step |= set(node.output)
        else:
            rest.append(node)
    frontier = sorted({name for node in rest for name in node.input} & by_step)

    telling = helper.make_model(
        helper.make_graph(
            [*once, *scalar],
            "constants",
            [value for value in graph.input if value.name in steps[0]],
            [onnx.ValueInfoProto(name=name) for name in frontier if name not in steps[0]],
            graph.initializer,
        ),
        opset_imports=step.opset_import,
        ir_version=step.ir_version,
    )
    asked = [value.name for value in telling.graph.output]
    session = _session(telling.SerializeToString()) if asked else None

    nodes, constants = list(once), list(graph.initializer)
    z = "noise"
    for k, values in enumerate(steps, 1):
        names = {"z": z}
        found = dict(values)
        if session is not None:
            found |= dict(zip(asked, session.run(asked, dict(values)), strict=True))
        for name in frontier:
            names[name] = f"{name}_of_step_{k}"
            constants.append(numpy_helper.from_array(found[name], names[name]))
        for node in rest:
            names |= {name: f"{name}_of_step_{k}" for name in node.output if name}
            copy = deepcopy(node)
            copy.name = f"{node.name}_of_step_{k}"
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            nodes.append(copy)
        z = names["z_s"]
    for name, limit in (("lowest", -1.0), ("highest", 1.0)):
        constants.append(numpy_helper.from_array(torch.tensor(limit).numpy(), name))
    operation, limits = ("Clip", ["lowest", "highest"]) if clip else ("Identity", [])
    nodes.append(helper.make_node(operation, [z, *limits], ["images"]))
    used = {name for node in nodes for name in node.input}

    def renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
        copy = deepcopy(value)
        copy.name = name
        return copy

    given = [value for value in graph.input if value.name not in steps[0]]
    whole = helper.make_graph(
        nodes,
        "sampler",
        [renamed(value, "noise" if value.name == "z" else value.name) for value in given],
        [renamed(graph.output[0], "images")],
        [tensor for tensor in constants if tensor.name in used],
    )
    return helper.make_model(whole, opset_imports=step.opset_import, ir_version=step.ir_version)


def _store_rounded(model: onnx.ModelProto, precision: str) -> None:
    """Store large weights as float16 or int8, each with a node that turns it back into float32.

    int8 has one scale for each row (output channel of a convolution): the largest magnitude is 127.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph, nodes, tensors = model.graph, [], []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or np.prod(tensor.dims) < SMALL:
            tensors.append(tensor)
            continue
        values, stored = numpy_helper.to_array(tensor), f"{tensor.name}_stored"
        if precision == "fp16":
            tensors.append(numpy_helper.from_array(values.astype(np.float16), stored))
            nodes.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            continue
        scale = np.maximum(np.abs(values.reshape(len(values), -1)).max(axis=1), 1e-12).astype(np.float32) / 127
        whole = np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        tensors += [numpy_helper.from_array(whole, stored), numpy_helper.from_array(scale, f"{stored}_scale")]
        nodes.append(helper.make_node("DequantizeLinear", [stored, f"{stored}_scale"], [tensor.name], axis=0))
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(tensors)
    graph.node.extend(nodes)


def _clean(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes on source code and paths of this machine; name the batch size."""
    import vdiff

    model.producer_name, model.producer_version, model.doc_string = "vdiff", vdiff.__version__, ""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for value in [*model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
        value.type.tensor_type.shape.dim[0].dim_param = BATCH


def _session(model: str | bytes) -> Any:
    """ONNX Runtime on the CPU, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    """Show only errors of `logger`; the exporter also logs its internals."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
