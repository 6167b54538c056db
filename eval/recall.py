"""Recall of causal language models, by distance: how well they retrieve earlier tokens of their context.

    python eval/recall.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence --text README.md --split all
    python eval/recall.py runs/quickstart/recurrence --distances 16 64 256 1024 --context-length 2048

pairs     random key-value pairs of tokens, then every key again, in random order, each followed by its value: is that
          the most likely of all values? (multi-query associative recall, arXiv:2312.04927; its gain is relative to
          values of other pairs that were read as often)
copying   random tokens, then the same again: is the correct token the most likely?
passkey   other text, a marker, a random key, more text, the marker: does greedy decoding continue with the key? (its
          gain is relative to the same key where a different one was shown)
needle    other text, a needle of real text, more text, the needle's first tokens: how many more of those that follow
          are the most likely than where a different needle was shown? (its gain is the difference in loss)
passages  other text, a passage, more of the other text, the passage again: how much lower is the loss of the second?
repeats   the loss on the text itself, of tokens that complete a trigram of their context again, by the distance to
          where it was last read, and of all other tokens

The models are not trained for these tasks. Distances double from 16 to four times the training context, as far as all
models can read; means are over those that fit the context, and beyond it only passages and needles are read, with fewer
sequences. Pairs and repeats are binned by distance, from the previous one (exclusive) to this one (inclusive); all else
starts exactly that far apart. The distances beyond a model's window of attention are named, and are `beyond_window` in
its JSON. A --context-length beyond that of training makes room for all tasks further apart. All sequences depend only
on the seed, the text and the tokenizer; intervals are over sequences, those of repeats over documents. The text is the
test split of the standard library if none is given. The last line is JSON.
"""

import sys

from scavenger.report import command, comparison, retrieval


def main(argv: list[str] | None = None) -> int:
    made = command.parser(__doc__)
    command.add_text(made)
    made.add_argument(
        "--distances", type=int, nargs="+", metavar="N", help="tokens (16, 32, …, four contexts; the furthest in one)"
    )
    made.add_argument(
        "--context-length", type=int, help="tokens that distances of the means fit (the shortest training context)"
    )
    made.add_argument("--examples", type=int, default=retrieval.EXAMPLES, help=f"of each kind ({retrieval.EXAMPLES})")
    return command.run("recall", made, measure, argv)


def measure(args, results) -> list[dict]:
    command.positive(args, "distances", "context_length", "examples")
    models = command.models_of(args)
    settings = retrieval.settings_for(models, args.distances, args.context_length, args.examples, args.seed)
    asked = set(args.distances or ())
    for distances, said in (
        (asked - set(settings.distances), "are left out: they are further than four contexts, or than the models read"),
        (asked & set(settings.beyond_context), "are read for passages and needles only, and are in no mean"),
    ):
        if distances:
            print(
                f"recall: a context of {settings.context_length} tokens is too short for distances "
                f"{', '.join(map(str, sorted(distances)))}, which {said}; use a longer --context-length",
                file=sys.stderr,
            )
    text = command.text_of(args, args.limit)
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
    facts = {"settings": {"recall": retrieval.described(settings)}}
    facts["models"] = {model.label: {"attention_window": model.attention_window} for model in models}
    for result in found:
        if result["beyond_window"]:
            distances = ", ".join(map(str, result["beyond_window"]))
            print(
                f"recall: {result['model']}: distances {distances} are beyond its attention window of "
                f"{result['attention_window']:,} tokens",
                file=sys.stderr,
            )
    for said in comparison.recall_within_window(facts, [model.label for model in models]):
        print(f"recall: {said}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
