"""Inputs and outputs of a TensorRT engine, compared with the manifest's and with a call's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lvlm.core.errors import BackendError, CapacityError
from lvlm.runtime.backends import BEST
from lvlm.runtime.backends.trt.driver import DeviceArray
from lvlm.runtime.bundle.manifest import Graph, Port

TYPES = {  # TensorRT's names
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
GREEDY = Port(BEST, "int64", ("batch",))
# What bounds a dimension of an engine's profile: the tokens of a prompt, unless it is one of these.
LIMITS = {
    "batch": ("prompts at once", "--batch"),
    "rows": ("image tokens at once", "--batch"),
    "units": ("images at once", "--batch"),
}
TOKENS = ("tokens of a prompt", "--max-prompt")


def check_ports(
    trt: Any, engine: Any, name: str, graph: Graph, weights: Mapping[str, DeviceArray]
) -> None:
    """BackendError unless the engine's inputs and outputs are the manifest's, the weights and
    maybe BEST, all of them in the device's memory."""
    again = "build the engines of this bundle again"
    wanted = {(port.name, port.dtype, True) for port in graph.inputs}
    wanted |= {(weight, array.dtype, True) for weight, array in weights.items()}
    wanted |= {(port.name, port.dtype, False) for port in graph.outputs}
    types = {code: ours for ours, code in TYPES.items()}
    real = set()
    for tensor in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        code = engine.get_tensor_dtype(tensor).name
        is_input = engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT
        real.add((tensor, types.get(code, code), is_input))
        if engine.is_shape_inference_io(tensor):
            raise BackendError(f"the {name} engine reads {tensor} on the host; {again}")
        if tensor in weights and tuple(engine.get_tensor_shape(tensor)) != weights[tensor].shape:
            raise BackendError(f"the {name} engine takes {tensor} of another shape; {again}")
    if odd := (real - {(BEST, GREEDY.dtype, False)}) ^ wanted:
        raise BackendError(f"the {name} engine and the manifest differ in {min(odd)[0]}; {again}")


def check_shape(engine: Any, name: str, port: Port, shape: tuple[int, ...]) -> None:
    """CapacityError for what the engine was not built for; the message names the flag."""
    built = tuple(engine.get_tensor_shape(port.name))
    low = high = built
    if -1 in built:
        low, _, high = map(tuple, engine.get_tensor_profile_shape(port.name, 0))
    if len(built) != len(shape):
        raise BackendError(f"the {name} engine takes {port.name} of shape {built}, not {shape}")
    for dim, given, minimum, maximum in zip(port.dims, shape, low, high, strict=True):
        if minimum <= given <= maximum:
            continue
        if minimum == maximum and dim not in LIMITS:
            raise BackendError(
                f"the {name} engine takes {port.name} of shape {list(built)}, not {list(shape)}; "
                "build the engines of this bundle again"
            )
        what, flag = LIMITS.get(str(dim), TOKENS)
        raise CapacityError(
            f"the {name} engine takes {minimum} to {maximum} {what} ({port.name}), this call has "
            f"{given}; give {'fewer' if given > maximum else 'more'}, or build it with another "
            f"{flag} (lvlm-build engine)"
        )
