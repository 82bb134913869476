"""Take docs/page.png: the page of lvlm-serve with an answer and the overlay of its image's patches.

    lvlm-export -m tiny-llava -r lightvlm -o out/
    python scripts/page_screenshot.py out/ docs/page.png

Needs playwright and the system's Chromium (``--chromium`` says where it is elsewhere).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

IMAGE = Path(__file__).parents[1] / "assets/samples/digits-1.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", help="a folder made by lvlm-export")
    parser.add_argument("png", type=Path, help="the file to write")
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--question", default="Read the top row.")
    parser.add_argument("--keep", type=int, default=25, help="image tokens, in percent")
    parser.add_argument("--dark", action="store_true", help="the dark scheme")
    parser.add_argument("--size", type=int, nargs=2, default=(1200, 740), metavar=("W", "H"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    args = parser.parse_args()
    command = [sys.executable, "-m", "lvlm", "serve", args.bundle, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = server.stderr.readline()
        place = re.search(r"https?://\S+", said)
        if place is None:
            sys.exit(said + server.stderr.read())
        shoot(place[0], args)
    finally:
        server.terminate()
        server.wait()
    with Image.open(args.png) as whole:
        small = whole.convert("RGB").quantize(256)  # half as large
    small.save(args.png, optimize=True)
    print(f"{args.png}: {args.png.stat().st_size / 1e3:.0f} kB")


def shoot(url: str, args: argparse.Namespace) -> None:
    """Ask by the page at ``url``, and take a screenshot of it."""
    from playwright.sync_api import sync_playwright

    wide, high = args.size
    with sync_playwright() as found:
        browser = found.chromium.launch(executable_path=args.chromium)
        page = browser.new_page(
            viewport={"width": wide, "height": high},
            color_scheme="dark" if args.dark else "light",
        )
        page.goto(url)
        page.wait_for_selector("#model option", state="attached")
        page.set_input_files("#file", args.image)
        page.wait_for_selector("#image:visible")
        page.fill("#question", args.question)
        if page.is_visible("#keep"):
            page.fill("#keep", str(args.keep))
        for _ in range(2):  # the first one also warms up
            page.click("#send")
            page.wait_for_selector("#told:not([hidden])")
            page.wait_for_selector("#send:not([disabled])")
        page.screenshot(path=args.png)
        browser.close()


if __name__ == "__main__":
    main()
