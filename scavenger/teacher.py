"""The teacher: a GPT-NeoX, loaded or trained here, frozen; and what goes in and out of its attention layers."""

import contextlib
import functools
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from scavenger import data, measure, training
from scavenger.recipe import Recipe, RecipeError
from scavenger.run import checkpoint


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"  # as in the tokenizer of GPT-NeoX-20B


def run(recipe: Recipe, run_dir: Path, accelerator, tokenizer) -> Path | None:
    """Train the teacher where the recipe says so; returns its folder."""
    folder = run_dir / "teacher"
    train = recipe.teacher.train
    if train is None or checkpoint.complete(folder):
        return folder if train else None
    torch.manual_seed(recipe.seed)
    model = GPTNeoXForCausalLM(configuration(recipe, tokenizer))
    blocks = data.blocks(run_dir / "data", "train")
    history, model = training.train(
        "teacher",
        training.NextTokens(model),
        training.next_token_loss,
        lambda step: data.batch(blocks, step * train.batch_size, train.batch_size, recipe.seed),
        train,
        checkpoint.partial(folder) / "steps",
        accelerator,
        recipe,
    )
    checkpoint.finish_model(
        model,
        tokenizer,
        history,
        folder,
        accelerator,
        more=lambda beside: _write_card(recipe, run_dir, model, history, beside),
    )
    return folder


def load(recipe: Recipe, run_dir: Path, device: torch.device | str = "cpu") -> GPTNeoXForCausalLM:
    """The teacher on the device, without gradients and in evaluation mode.

    It is kept in the checkpoint's own dtype where the recipe names no other: Pythia's float16 takes half the memory of
    float32. On a CPU, which has no fast products of half precision, that is float32.
    """
    load_configuration(recipe, run_dir)
    where, dtype = _where(recipe, run_dir), recipe.teacher.dtype
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    with _clear_errors(where):
        model = GPTNeoXForCausalLM.from_pretrained(
            where,
            revision=_revision(recipe),
            dtype=dtype,
            use_safetensors=None if recipe.teacher.allow_pickle else True,
        )
    return model.requires_grad_(False).eval().to(device)


def load_configuration(recipe: Recipe, run_dir: Path) -> GPTNeoXConfig:
    """The teacher's configuration."""
    where = _where(recipe, run_dir)
    with _clear_errors(where):
        config = AutoConfig.from_pretrained(where, revision=_revision(recipe))
    if not isinstance(config, GPTNeoXConfig):
        raise RecipeError(f"teacher: {where} is a {config.model_type}; expected a GPT-NeoX model")
    return config


def tokenizer(recipe: Recipe, run_dir: Path) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer; for a teacher trained here, a byte-level BPE trained on the train split."""
    train = recipe.teacher.train
    if train is None:
        where = _where(recipe, run_dir)
        with _clear_errors(where):
            found = AutoTokenizer.from_pretrained(
                where, revision=_revision(recipe), trust_remote_code=recipe.teacher.trust_remote_code
            )
        if found.eos_token_id is None:
            raise RecipeError(
                f"teacher: the tokenizer of {where} has no end-of-text token; expected one, to part documents"
            )
        return found
    folder = run_dir / "tokenizer"
    if not checkpoint.complete(folder):
        made = _train_tokenizer(recipe, train.vocab_size)
        beside = checkpoint.partial(folder)
        beside.mkdir(parents=True, exist_ok=True)
        made.save_pretrained(beside)
        checkpoint.finish(folder)
    return AutoTokenizer.from_pretrained(folder)


def configuration(recipe: Recipe, tokenizer) -> GPTNeoXConfig:
    """Pythia's architecture (rotary on a quarter of each head, parallel residual) at the recipe's size."""
    train = recipe.teacher.train
    return GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=train.hidden_size,
        num_hidden_layers=train.num_layers,
        num_attention_heads=train.num_heads,
        intermediate_size=4 * train.hidden_size,
        max_position_embeddings=recipe.data.context_length,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def attention(model: GPTNeoXForCausalLM, ids: Tensor, layers: Sequence[int]) -> tuple[dict, dict]:
    """What the attention of each of `layers` takes in and gives out, both {layer: (batch, length, channel)}.

    The model is run up to the last of them and no further.
    """

    def stop(module, args, output):
        raise _Deep

    with listening(model, layers) as heard:
        last = model.gpt_neox.layers[max(layers)].attention.register_forward_hook(stop)
        try:
            with contextlib.suppress(_Deep):
                model.gpt_neox(input_ids=ids, use_cache=False)
        finally:
            last.remove()
    return heard


@contextlib.contextmanager
def listening(model: GPTNeoXForCausalLM, layers: Sequence[int]):
    """While the model runs inside, ({layer: input}, {layer: output}) of the attention of `layers` fill.

    Hooks, because `output_hidden_states` gives blocks, not mixers, and its last entry is past the final norm.
    """
    inputs, outputs = {}, {}

    def hear(layer, module, args, kwargs, output):
        inputs[layer] = args[0] if args else kwargs["hidden_states"]
        outputs[layer] = output[0]

    with contextlib.ExitStack() as stack:
        for layer in layers:
            heard = model.gpt_neox.layers[layer].attention
            stack.callback(heard.register_forward_hook(functools.partial(hear, layer), with_kwargs=True).remove)
        yield inputs, outputs


@torch.no_grad()
def hidden_states(model: GPTNeoXForCausalLM, ids: Tensor, blocks: bool) -> tuple[Tensor, list[Tensor]]:
    """What the head reads (batch, length, channel), and with `blocks` what each block gives out."""
    outputs = []
    with contextlib.ExitStack() as stack:
        for layer in model.gpt_neox.layers if blocks else ():
            stack.callback(layer.register_forward_hook(lambda module, args, output: outputs.append(output)).remove)
        last = model.gpt_neox(input_ids=ids, use_cache=False).last_hidden_state
    return last, outputs


class _Deep(Exception):
    """Raised where nothing that follows is wanted."""


def _train_tokenizer(recipe, vocab_size):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (text for name, text in data.documents(recipe.data, recipe.seed) if data.split_of(name) == "train")
    bpe.train_from_iterator(tqdm(texts, desc="tokenizer", unit="doc", leave=False), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
    )


def _where(recipe, run_dir):
    return recipe.teacher.folder or (run_dir / "teacher" if recipe.teacher.train else recipe.teacher.name)


def _revision(recipe):
    return recipe.teacher.revision if recipe.teacher.folder is None else None


@contextlib.contextmanager
def _clear_errors(where):
    """transformers' long explanations of an unreachable or damaged checkpoint, as one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"teacher: {where} cannot be loaded ({reason}); expected a reachable Hub name with "
            "safetensors, or teacher.path=<local folder>"
        ) from error


def _write_card(recipe, run_dir, model, history, folder):
    """The model card and `training.json`: what it was trained on, for how long, what it reaches on unseen text."""
    train = recipe.teacher.train
    source = checkpoint.read_json(run_dir / "data" / "source.json")
    found = measure.held_out(model, data.blocks(run_dir / "data", "test"))
    facts = {
        "tokens": train.steps * train.batch_size * recipe.data.context_length,
        "distinct_tokens": source["tokens"]["train"],
        "steps": train.steps,
        "seconds": history[-1]["seconds"],
        "test_loss": found.loss,
        "test_perplexity": found.perplexity,
        "test_tokens": found.tokens,
        "last_training_loss": history[-1]["loss"],
        "seed": recipe.seed,
        "corpus": {key: value for key, value in source.items() if not isinstance(value, dict)},
    }
    checkpoint.write_json(folder / "training.json", facts)
    corpus = ", ".join(f"{key} {value}" for key, value in facts["corpus"].items())
    rows = {
        "architecture": f"GPTNeoXForCausalLM, {train.num_layers} layers, width {train.hidden_size}, "
        f"{train.num_heads} heads, context {recipe.data.context_length}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tokenizer": f"byte-level BPE, {model.config.vocab_size:,} tokens, trained on the train split",
        "corpus": f"{corpus}; split by whole documents",
        "tokens seen": f"{facts['tokens']:,} ({train.steps:,} steps of {train.batch_size} × "
        f"{recipe.data.context_length}), {facts['distinct_tokens']:,} of them distinct",
        "held-out loss": f"{found.loss:.4f} nats per token, perplexity {found.perplexity:.3f} "
        f"({found.tokens:,} tokens of the test split)",
        "last training loss": f"{facts['last_training_loss']:.4f}",
        "training time": f"{facts['seconds'] / 60:.0f} minutes on {torch.get_num_threads()} threads of "
        f"{platform.machine() if model.device.type == 'cpu' else torch.cuda.get_device_name()}",
        "seed": f"{recipe.seed}",
        "made": time.strftime("%Y-%m-%d"),
    }
    checkpoint.write_text(
        folder / "README.md",
        "\n".join(
            [
                "---",
                "library_name: transformers",
                "tags: [gpt_neox]",
                "---",
                f"# {Path(recipe.run_dir).name}",
                "",
                "A small GPT-NeoX, made by a scavenger recipe to be a teacher.",
                "",
                "| | |",
                "|---|---|",
                *(f"| {key} | {value} |" for key, value in rows.items()),
                "",
            ]
        ),
    )
