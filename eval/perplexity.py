"""Sliding-window perplexity of checkpoint folders or Hub models on a text, per token and per byte, with intervals.

    python eval/perplexity.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence --text README.md --split all
    python eval/perplexity.py teacher=EleutherAI/pythia-70m runs/neox70m/recurrence --dataset NAME --stride 512

Each document is read separately, in windows of --context-length tokens. The loss by position is measured in contexts of
--longest tokens, also past the training length. The text is the test split of the standard library if none is given.
Intervals are over documents. The last line is JSON. As a metric of `evaluate`, from any folder and without network:

    evaluate.load("eval/perplexity.py").compute(predictions=["def f(x):", …], model_id="runs/quickstart/recurrence")
"""

import sys

import datasets
import evaluate

from scavenger.report import command, likelihood
from scavenger.report.evaluated import Evaluated
from scavenger.report.text import Text


class SlidingPerplexity(evaluate.Metric):
    """Perplexity of a causal language model on texts; compare models of different tokenizers in bits per byte."""

    def _info(self):
        return evaluate.MetricInfo(
            description="exp of the mean cross-entropy per token in a sliding window, each text separately.",
            citation="",
            inputs_description="predictions: texts; model_id: folder or Hub name; context_length, stride: tokens",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model_id, context_length=None, stride=None):
        if not predictions:
            raise ValueError("found no predictions; expected texts")
        model = Evaluated(model_id, model_id)
        settings = likelihood.settings_for([model], context_length, stride)
        found = likelihood.of(model, Text("predictions", "", predictions), settings)
        rows = command.summary(found)["metrics"]
        return {
            "perplexity": rows["perplexity"]["value"],
            "interval": [rows["perplexity"]["low"], rows["perplexity"]["high"]],
            "bits_per_byte": rows["bits per byte"]["value"],
        }


def main(argv: list[str] | None = None) -> int:
    made = command.parser(__doc__)
    command.add_text(made)
    made.add_argument("--context-length", type=int, help="tokens of a window (the shortest training context)")
    made.add_argument("--stride", type=int, help="tokens from one window to the next (half a window)")
    made.add_argument("--longest", type=int, help="tokens of the contexts that positions are measured in (4 windows)")
    return command.run("perplexity", made, measure, argv)


def measure(args, results) -> list[dict]:
    command.positive(args, "context_length", "stride", "longest")
    models, text = command.models_of(args), command.text_of(args, args.limit)
    settings = likelihood.settings_for(models, args.context_length, args.stride, args.longest)
    found = []
    for model in models:
        record = likelihood.described(settings) | text.settings
        found.append(results.of("perplexity", model, record, lambda model=model: likelihood.of(model, text, settings)))
        model.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
