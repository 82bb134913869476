"""The engine within asyncio: answers side by side, one of them streamed, one given up.

python examples/serve_async.py out/lightvlm assets/samples/digits-1.png
"""

import argparse
import asyncio

import lvlm


async def answer_all(bundle: str, image: str) -> None:
    async with lvlm.AsyncEngine(lvlm.Engine(bundle, slots=3)) as engine:
        row, count = await asyncio.gather(
            engine.generate("Read the top row.", images=[image]),
            engine.generate("How often does 3 appear?", images=[image]),
        )
        print(row.text)
        print(count.text)
        async with await engine.submit("Describe the picture.", images=[image]) as handle:
            async for piece in handle:
                print(piece, end="", flush=True)
            print()
        try:
            await engine.generate("Describe the picture.", images=[image], timeout=1e-3)
        except lvlm.RequestTimeout as error:
            print(f"given up: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("image")
    args = parser.parse_args()
    asyncio.run(answer_all(args.bundle, args.image))


if __name__ == "__main__":
    main()
