"""Many requests at once: an engine takes them as they come and decodes them together.

python examples/serve_many.py out/lightvlm assets/samples/digits-1.png assets/samples/digits-2.png
"""

import argparse

import lvlm

QUESTIONS = ("Describe the picture.", "Read the top row.", "How often does 3 appear?")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--slots", type=int, default=4, help="requests that run at once")
    args = parser.parse_args()
    with lvlm.Engine(args.bundle, slots=args.slots) as engine:
        print(f"memory, fixed before the start: {engine.memory().total / 1e6:.0f} MB")
        handles = {
            (image, question): engine.submit(question, images=[image], max_new_tokens=64)
            for image in args.images
            for question in QUESTIONS
        }
        for (image, question), handle in handles.items():
            print(f"{image}: {question}\n    {handle.result(timeout=600).text}")
        stats = engine.stats()
        print(f"{stats.answered} answered, {stats.tokens_per_second:.0f} tokens per second")


if __name__ == "__main__":
    main()
