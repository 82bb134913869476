"""A model repository: config.pbtxt, model.py and the bundle, in the folders that Triton expects."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lvlm.core.errors import BuildError, ParameterError, shown
from lvlm.core.output import check_place, temporary_sibling
from lvlm.runtime.server.triton_server.model_settings import Settings

VERSION = "1"
TEMPLATE = "chat_template.jinja"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MODEL = '''\
"""The model: an engine of lvlm, which all of its requests share. Made by lvlm-build triton."""

import triton_python_backend_utils as triton

from lvlm.runtime.server.triton_server.backend import TritonBackend


class TritonPythonModel:
    def initialize(self, args):
        self.backend = TritonBackend(triton, args)

    def execute(self, requests):
        self.backend.execute(requests)

    def finalize(self):
        self.backend.close()
'''
HEAD = """\
# Made by lvlm-build triton. The parameters in small letters are its flags (docs/triton.md).
"""


@dataclass(frozen=True)
class TritonPort:
    """An input or an output; ``dims`` -1: any number."""

    name: str
    kind: str
    dims: tuple[int, ...] = (1,)


# Names of the vLLM backend where they mean the same
INPUTS = (
    TritonPort("text_input", "TYPE_STRING"),
    TritonPort("image", "TYPE_STRING", (-1,)),
    TritonPort("messages", "TYPE_STRING"),
    TritonPort("stream", "TYPE_BOOL"),
    TritonPort("sampling_parameters", "TYPE_STRING"),
    TritonPort("exclude_input_in_output", "TYPE_BOOL"),
)
OUTPUTS = (
    TritonPort("text_output", "TYPE_STRING", (-1,)),
    TritonPort("finish_reason", "TYPE_STRING", (-1,)),
    TritonPort("token_ids", "TYPE_INT32", (-1, -1)),
    TritonPort("logprobs", "TYPE_STRING", (-1,)),
    TritonPort("tool_calls", "TYPE_STRING", (-1,)),
    TritonPort("usage", "TYPE_STRING"),
)


def model_name(bundle: Path, name: str | None) -> str:
    """The name that clients ask for: as given, or the bundle's. Raises ParameterError."""
    wanted = bundle.resolve().name if name is None else name
    if not NAME.fullmatch(wanted):
        raise ParameterError(
            f"--name is {shown(wanted)}; give letters, digits, dots, dashes and underscores, as "
            "in --name tiny-llava"
        )
    return wanted


def write_model(
    repository: Path, name: str, bundle: Path, settings: Settings, *, template: str, link: bool
) -> Path:
    """The folder of the model in ``repository``, which is made where there is none; with a copy of
    the bundle, or a link to it, and the chat template's text where the settings name its file.
    Raises BuildError."""
    folder = repository / name
    if not repository.is_dir():
        if os.path.lexists(repository):
            raise BuildError(f"-o {repository} is no folder; give another one")
        check_place("-o", repository, BuildError)
        repository.mkdir(exist_ok=True)
    if os.path.lexists(folder):
        raise BuildError(f"{folder} exists; remove it, or give the model another --name")
    check_place("-o", folder, BuildError)
    with temporary_sibling(folder, BuildError) as partial:
        version = partial / VERSION
        version.mkdir()
        (partial / "config.pbtxt").write_text(config(name, settings), encoding="utf-8")
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        if settings.chat_template is not None:
            (version / settings.chat_template).write_text(template, encoding="utf-8")
        if link:
            (version / settings.bundle).symlink_to(bundle.resolve(), target_is_directory=True)
        else:
            shutil.copytree(bundle, version / settings.bundle)
        partial.rename(folder)
    return folder


def config(name: str, settings: Settings) -> str:
    """config.pbtxt. One instance answers all: the engine batches by itself."""
    kind = "KIND_CPU" if settings.device == "cpu" else "KIND_MODEL"  # the engine finds its device
    lines = [
        f"name: {_text(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
        *(f"input {{ {_port(port)} optional: true }}" for port in INPUTS),
        *(f"output {{ {_port(port)} }}" for port in OUTPUTS),
        *(
            f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"
            for key, value in settings.parameters.items()
        ),
    ]
    return HEAD + "\n".join(lines) + "\n"


def _port(port: TritonPort) -> str:
    return f"name: {_text(port.name)} data_type: {port.kind} dims: {list(port.dims)}"


def _text(value: str) -> str:
    """A text of protobuf's text format, which has JSON's escapes for ASCII."""
    return json.dumps(value)
