"""Every file of examples/, as its docstring says to run it, on one bundle."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "ask.py": r"^8, 0, 9\n\d+ tokens, ended by stop$",
    "chat.py": r"^Read the top row\..*\n    8, 0, 9 \(.*\nAnd again\? .*\n    .* already",
    "inspect_answer.py": r"keep 0\.35: 8, 0, 9\n.*\(576, 406, 286, 286, 202, 202, 202, 202\)",
    "serve_async.py": r"^8, 0, 9\n.*\ngiven up: the request's timeout is over",
    "serve_many.py": r"\n    8, 0, 9\n.*6 answered",
    "stream.py": r"^The picture shows nine things on a dark canvas\.",
}
# Starting a server takes longer than each of these: its requests are tried in
# tests/runtime/server/test_serving_files.py
ELSEWHERE = ["serve_client.py"]


def test_examples_run_as_they_say(bundle: Callable[..., Path]) -> None:
    folder = bundle("tiny-llava", "lightvlm", max_images=2)
    files = sorted((ROOT / "examples").glob("*.py"))
    files = [file for file in files if file.name not in ELSEWHERE]
    assert [file.name for file in files] == sorted(EXPECTED)
    for file in files:
        shown = re.search(r"^python (examples/.*)$", file.read_text(), re.MULTILINE)
        assert shown is not None, f"{file.name} does not say how to run it"
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', shown[1])]
        assert words[:2] == [f"examples/{file.name}", "out/lightvlm"]
        words[1] = str(folder)
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(EXPECTED[file.name], done.stdout, re.DOTALL), done.stdout
