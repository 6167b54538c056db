"""Perplexity of any checkpoint folder or Hub name on a text, as a command and as a metric of `evaluate`.

python eval/perplexity.py runs/quickstart/recurrence scavenger/assets/teacher-stdlib --text some.txt

evaluate.load("eval/perplexity.py").compute(predictions=["def f(x):", …], model_id="runs/quickstart/recurrence")
"""

import argparse
import json
import sys

import datasets
import evaluate
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import scavenger.model  # noqa: F401  (AutoModel knows the student)
from scavenger.measure import held_out


DESCRIPTION = (
    "exp of the mean cross-entropy per token, texts packed end to end and cut into contexts read on their own."
)


class PackedPerplexity(evaluate.Metric):
    """Perplexity of a causal language model on texts; models of different tokenizers compare in bits per byte."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: texts; model_id: folder or Hub name",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model_id, context_length=256):
        return measure(model_id, predictions, context_length)


def measure(model_id: str, texts: list[str], context_length: int) -> dict:
    """Perplexity, loss (nats per token), bits per byte and tokens of one model; ValueError for too little text."""
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    ids = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    count = len(ids) // context_length
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens; expected at least one context of {context_length}")
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    blocks = np.array(ids[: count * context_length]).reshape(count, context_length)
    found = held_out(model, blocks)
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(ids)
    return {
        "model": model_id,
        "perplexity": found.perplexity,
        "loss": found.loss,
        "bits_per_byte": found.loss / np.log(2) / bytes_per_token,
        "tokens": found.tokens,
        "context_length": context_length,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoint folders or Hub names")
    parser.add_argument("--text", required=True, help="a UTF-8 text file")
    parser.add_argument("--context-length", type=int, default=256)
    args = parser.parse_args()
    try:
        with open(args.text, encoding="utf-8") as file:
            texts = [file.read()]
        rows = [measure(model, texts, args.context_length) for model in args.models]
    except (OSError, ValueError) as error:
        print(f"perplexity: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    width = max(len(row["model"]) for row in rows)
    print(f"{'model':<{width}}  {'perplexity':>10}  {'bits/byte':>9}  {'tokens':>9}")
    for row in rows:
        print(f"{row['model']:<{width}}  {row['perplexity']:>10.3f}  {row['bits_per_byte']:>9.4f}  {row['tokens']:>9,}")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
