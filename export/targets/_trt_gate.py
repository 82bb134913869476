"""TensorRT's own parser and builder as a gate: TensorRT-RTX builds engines without a GPU.

What passes here is taken by the parser TensorRT shares with it; what the parser *ignores* is found
too: it drops an input it cannot use (``nonpad_kv_seqlen`` of ``Attention``) without a word, and the
engine then computes something else. So every input of a network must reach a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm.runtime.errors import BackendError

Profiles = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]  # min, opt, max shapes


def build(model: str | Path | bytes, profiles: Profiles | None = None) -> memoryview:
    """Parse ``model``, require that every input is consumed, and build an engine ahead of time.

    model     path of an ONNX file (external data beside it is found), or a model's bytes
    profiles  (min, opt, max) shape of every input with a dynamic axis; others may be left out
    Returns the serialized engine; its ``nbytes`` is the size.
    Raises BackendError with the parser's or builder's message, or naming unconsumed inputs.
    """
    trt = _tensorrt()
    log = _logger(trt)
    builder, network = _parse(trt, log, model)
    if unused := _unconsumed(network):
        raise BackendError(
            f"TensorRT-RTX leaves {', '.join(unused)} of the graph unused: it would compute "
            "something else than the graph says; lower the node that reads it"
        )
    config = builder.create_builder_config()
    if profiles:
        profile = builder.create_optimization_profile()
        for name, (low, opt, high) in profiles.items():
            profile.set_shape(name, tuple(low), tuple(opt), tuple(high))
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT-RTX refuses the shape profile: {log.text()}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"TensorRT-RTX cannot build this graph: {log.text()}")
    return memoryview(engine)


def unconsumed_inputs(model: str | Path | bytes) -> list[str]:
    """Names of the inputs that no layer of the parsed network reads. Raises as ``build`` does."""
    trt = _tensorrt()
    return _unconsumed(_parse(trt, _logger(trt), model)[1])


def _unconsumed(network: Any) -> list[str]:
    read = set()
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        tensors = (layer.get_input(i) for i in range(layer.num_inputs))
        read |= {tensor.name for tensor in tensors if tensor is not None}
    names = (network.get_input(i).name for i in range(network.num_inputs))
    return [name for name in names if name not in read]


def _parse(trt: Any, log: Any, model: str | Path | bytes) -> tuple[Any, Any]:
    builder = trt.Builder(log)
    # Precision comes from the graph's own types: newer versions know no other way.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    in_memory = isinstance(model, bytes)
    if not (parser.parse(model) if in_memory else parser.parse_from_file(str(model))):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = [f"{e.desc()} ({e.node_operator()} {e.node_name()})" for e in errors]
        raise BackendError(f"TensorRT-RTX cannot parse this graph: {'; '.join(told) or log.text()}")
    return builder, network


def _tensorrt() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise BackendError("TensorRT-RTX is missing: pip install tensorrt-rtx") from error
    return tensorrt_rtx


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Prints nothing; remembers errors, since the builder reports them in no other way."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a GPU the builder also reports, and does without, a CUDA driver.
            failed = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            if failed and "catchCudaError" not in message:
                self.errors.append(message.strip())

        def text(self) -> str:
            return "; ".join(self.errors) or "no reason given"

    return Logger()
