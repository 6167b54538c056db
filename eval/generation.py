"""Compare generated text with that of a reference, the first model: where it diverges, how far, and whether it loops.

    python eval/generation.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence --text README.md --split all

greedy agreement  share of a continuation before the first token that differs from the reference's, both greedy
KL, top-1         between the reference and the model on the reference's greedy continuation; also by position
repeated 4-grams  share of a continuation's 4-grams that are repeats (seq-rep-4, arXiv:1908.04319)
ending in a loop  the last 16 tokens or more are one sequence, repeated three times or more
loss              of sampled text under the reference: low where a model repeats itself, high where it makes no sense

All models continue the same prompts from held-out text, and do not stop at end-of-text tokens. The column of the
held-out text has its true continuation in place of a sample. Intervals are over prompts. The text is the test split of
the standard library if none is given; samples are printed first, and the last line is JSON.
"""

import sys

from scavenger.report import command, continuation


PLAIN = continuation.Settings()


def main(argv: list[str] | None = None) -> int:
    made = command.parser(__doc__)
    command.add_text(made)
    made.add_argument("--prompts", type=int, default=PLAIN.prompts, help=f"({PLAIN.prompts})")
    made.add_argument("--prompt-tokens", type=int, default=PLAIN.prompt_tokens, help=f"({PLAIN.prompt_tokens})")
    made.add_argument("--new-tokens", type=int, default=PLAIN.new_tokens, help=f"({PLAIN.new_tokens})")
    made.add_argument(
        "--temperature", type=float, default=PLAIN.temperature, help=f"of sampled text ({PLAIN.temperature})"
    )
    made.add_argument("--top-k", type=int, default=PLAIN.top_k, help=f"of sampled text ({PLAIN.top_k})")
    return command.run("generation", made, measure, argv)


def measure(args, results) -> list[dict]:
    command.positive(args, "prompts", "prompt_tokens", "new_tokens", "top_k")
    models = command.models_of(args)
    settings = continuation.Settings(
        args.prompts, args.prompt_tokens, args.new_tokens, args.temperature, args.top_k, args.seed
    )
    first = models[0]
    for model in models:
        continuation.comparable(model, first)
    text = command.text_of(args, args.limit)
    stream = text.stream(first.tokenizer)
    prepared = continuation.prepare(first, stream, settings)
    record = continuation.described(settings) | text.settings | {"reference": first.weights}
    found = []
    for model in models:
        found.append(
            results.of(
                "generation",
                model,
                record,
                lambda model=model: continuation.run(model, first, stream, settings, prepared),
            )
        )
        if model is not first:
            model.close()
    print(continuation.side_by_side(found) + "\n")
    return [*found, {"model": "held-out text", "settings": found[0]["settings"], "metrics": found[0]["held_out"]}]


if __name__ == "__main__":
    sys.exit(main())
