"""Print an answer while it is written, and leave early if that is enough.

python examples/stream.py out/lightvlm assets/samples/digits-1.png --characters 80
"""

import argparse

import lvlm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("--characters", type=int, default=10_000, help="stop after so many")
    args = parser.parse_args()
    written = 0
    with (
        lvlm.load(args.bundle) as model,
        model.stream("Describe the picture.", images=[args.image]) as pieces,
    ):
        for piece in pieces:
            print(piece, end="", flush=True)
            written += len(piece)
            if written >= args.characters:
                break  # leaving the with block stops the model
    print()
    if pieces.result is not None:  # there once the last piece was read
        print(f"prefill {pieces.result.stats.prefill_ms:.0f} ms")


if __name__ == "__main__":
    main()
