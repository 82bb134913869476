"""Start lvlm-serve and ask it with OpenAI's client (pip install openai): an answer, a stream.

python examples/serve_client.py out/lightvlm assets/samples/digits-1.png
"""

import argparse
import base64
import mimetypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    from openai import OpenAI
except ImportError:
    raise SystemExit("OpenAI's client is missing: pip install openai") from None


@contextmanager
def served(bundle: str) -> Iterator[str]:
    """The address of a server that lives as long as the block."""
    words = [sys.executable, "-m", "lvlm", "serve", f"model={bundle}", "--port", "0"]
    with subprocess.Popen(
        [*words, "--log-level", "warning"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()  # "model at http://127.0.0.1:PORT", or what is wrong
        if not first.startswith("model at "):
            raise SystemExit(first + process.stderr.read())
        try:
            yield first.split()[-1]  # it listens already; requests wait until the model is ready
        finally:
            process.terminate()


def ask(client: OpenAI, image: str) -> None:
    kind = mimetypes.guess_type(image)[0]
    url = f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    image_part = {"type": "image_url", "image_url": {"url": url}}

    def messages(question: str) -> Any:
        return [{"role": "user", "content": [image_part, {"type": "text", "text": question}]}]

    answer = client.chat.completions.create(
        model="model",
        messages=messages("Read the top row."),
        extra_body={"keep": 0.5},  # fields that are not OpenAI's
    )
    print(answer.choices[0].message.content)
    assert answer.usage is not None
    told: Any = answer.usage.prompt_tokens_details
    print(f"image tokens: {told.image_tokens}, {told.image_tokens_kept} of them in the last block")
    stream = client.chat.completions.create(
        model="model", messages=messages("Describe the picture."), stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("image")
    args = parser.parse_args()
    with served(args.bundle) as address:
        ask(OpenAI(base_url=f"{address}/v1", api_key="none"), args.image)


if __name__ == "__main__":
    main()
