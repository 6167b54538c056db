"""How well causal language models look up again what they have read, by distance, side by side.

    python eval/recall.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence --text README.md
    python eval/recall.py runs/quickstart/recurrence --distances 16 64 256 1024 --context-length 2048

pairs     random pairs of tokens, then every first token again, in random order, each followed by its second: is that
          the most likely one of all seconds? (multi-query associative recall, arXiv:2312.04927; its gain is over
          seconds that were read as often, of other pairs)
copying   random tokens, and the same again: is the right token the most likely one?
passkey   other text, a marker, a random key, more text, the marker: is the key what greedy decoding goes on with? (its
          gain is over the same key where another one was shown)
passages  other text, a passage, more of the other text, the passage again: how much less is the second reading's loss?

The models are taken as they are and not trained for it. Pairs are binned by distance, from the previous one named
(exclusive) to this one (inclusive); all else starts exactly that far apart. With a --context-length beyond that of
training there is room for distances beyond it. All sequences follow from the seed, the text and the tokenizer alone;
intervals are over sequences. The text is the test split of the standard library if none is given. The last line is
JSON.
"""

import sys

from scavenger.report import command, retrieval


def main(argv: list[str] | None = None) -> int:
    made = command.parser(__doc__)
    command.add_text(made)
    made.add_argument(
        "--distances", type=int, nargs="+", metavar="N", help="tokens (16, 32, …, as many as fit the context)"
    )
    made.add_argument("--context-length", type=int, help="tokens (the shortest training context given)")
    made.add_argument("--examples", type=int, default=retrieval.EXAMPLES, help=f"of each kind ({retrieval.EXAMPLES})")
    return command.run("recall", made, measure, argv)


def measure(args, results) -> list[dict]:
    command.positive(args, "distances", "context_length", "examples")
    models = command.models_of(args)
    settings = retrieval.settings_for(models, args.distances, args.context_length, args.examples, args.seed)
    left_out = sorted(set(args.distances or ()) - set(settings.distances))
    if left_out:
        print(
            f"recall: a context of {settings.context_length} tokens has no room for distances "
            f"{', '.join(map(str, left_out))}: left out; --context-length makes room",
            file=sys.stderr,
        )
    text = command.text_of(args)
    found = []
    for model in models:
        record = retrieval.described(settings) | text.settings
        found.append(
            results.of(
                "recall",
                model,
                record,
                lambda model=model: retrieval.run(model, text.stream(model.tokenizer), settings),
            )
        )
        model.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
