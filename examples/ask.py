"""Load a bundle and ask about an image.

python examples/ask.py out/lightvlm assets/samples/digits-1.png "Read the top row."
"""

import argparse

import lvlm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("question", nargs="?", default="Describe the picture.")
    args = parser.parse_args()
    with lvlm.load(args.bundle) as model:
        answer = model.generate(args.question, images=[args.image], max_new_tokens=64)
    print(answer.text)
    print(f"{answer.stats.new_tokens} tokens, ended by {answer.finish_reason}")


if __name__ == "__main__":
    main()
