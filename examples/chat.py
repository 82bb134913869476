"""A conversation about an image: every question is asked in view of all that was said before.

python examples/chat.py out/lightvlm assets/samples/digits-1.png "Read the top row." "And again?"
"""

import argparse
from typing import Any

import lvlm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args()
    messages: list[dict[str, Any]] = []
    with lvlm.Engine(args.bundle, slots=1) as engine:  # it keeps what it can use for the next turn
        for question in args.questions:
            content = [{"type": "text", "text": question}]
            if not messages:
                content.insert(0, {"type": "image", "image": args.image})
            messages.append({"role": "user", "content": content})
            count = engine.count_tokens(messages)
            print(f"{question} ({count.prompt_tokens} tokens, room for {count.new_tokens} more)")
            answer = engine.generate(messages, max_new_tokens=64)
            print(f"    {answer.text} ({answer.stats.reused_tokens} tokens were there already)")
            messages.append({"role": "assistant", "content": answer.text})


if __name__ == "__main__":
    main()
