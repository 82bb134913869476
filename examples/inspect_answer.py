"""Look into an answer: image tokens that merging left, probabilities of tokens, cost of a ratio.

python examples/inspect_answer.py out/lightvlm assets/samples/digits-1.png --keep 1.0 0.35 0.15
"""

import argparse
import math

import lvlm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", help="of recipe lightvlm")
    parser.add_argument("image")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.35, 0.15])
    args = parser.parse_args()
    options = lvlm.GenerationOptions(max_new_tokens=16, logprobs=3)
    with lvlm.load(args.bundle) as model:
        for keep in args.keep:
            answer = model.generate(
                "Read the top row.", images=[args.image], options=options, keep=keep
            )
            print(f"keep {keep}: {answer.text.strip()}")
            print(f"  image tokens entering each block: {answer.stats.image_tokens_per_layer}")
            for stage, merged in enumerate(answer.merge_maps):
                dropped = int((merged < 0).sum())
                print(f"  reduction {stage}: {len(merged)} tokens, {dropped} dropped")
            least = min(answer.scores, key=lambda score: score.logprob)
            print(f"  least certain token: probability {math.exp(least.logprob):.2f}")
            print(f"  likeliest there: {[token for token, _ in least.top]}")


if __name__ == "__main__":
    main()
