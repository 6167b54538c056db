"""The teacher, loaded or trained here, frozen; and the inputs and outputs of its attention layers."""

import contextlib
import functools
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer

from scavenger import data, families, loading, measure, training
from scavenger.flops import Flops
from scavenger.recipe import Recipe, RecipeError, Teacher, TeacherTraining
from scavenger.run import checkpoint
from scavenger.run.run import Run


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"  # as in Pythia's tokenizer
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Files that transformers reads of a checkpoint: weights, configurations, tokenizers. Cards and figures may change.
LOADED = re.compile(
    r"\.(safetensors|bin|model|index\.json)$|^(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)"
    r"\.json$|^(merges|vocab)\.txt$"
)


def run(run: Run) -> Path | None:
    """Train the teacher where the recipe asks for it; returns its folder."""
    folder, train = run.folder / "teacher", run.recipe.teacher.train
    if train is None or checkpoint.complete(folder):
        return folder if train else None
    seed = run.recipe.seed
    torch.manual_seed(seed)
    shape = configuration(train, run.recipe.data.context_length, run.tokenizer)
    model = families.of(train.family).model(shape)
    blocks = run.blocks("train")
    optimisation = training.Optimisation(
        name="teacher",
        module=training.NextTokens(model),
        settings=train,
        steps_dir=checkpoint.partial(folder) / "steps",
        batch=lambda step: data.batch(blocks, step * train.batch_size, train.batch_size, seed),
        loss=training.next_token_loss,
        flops=3 * Flops(shape, run.recipe.data.context_length).whole,
    )
    history, model = training.train(run, optimisation)
    checkpoint.finish_model(run, model, history, folder, lambda beside: _write_card(run, model, history, beside))
    return folder


def load(settings: Teacher, run_dir: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The teacher on the device, without gradients and in evaluation mode.

    Without a dtype in the recipe it keeps the checkpoint's own: Pythia's float16 takes half the memory of float32. On a
    CPU, where half precision is slow, that is float32.
    """
    config = load_configuration(settings, run_dir)
    where, dtype = _where(settings, run_dir), settings.dtype
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    model = loading.model(
        families.of(config.model_type).model,
        where,
        revision=_revision(settings),
        dtype=dtype,
        use_safetensors=None if settings.allow_pickle else True,
    )
    model.config.return_dict = True  # whatever the checkpoint's own callers like
    return model.requires_grad_(False).eval().to(device)


def identities(settings: Teacher) -> dict[str, dict]:
    """The identity of each file that the teacher is loaded from, for a local folder; else nothing."""
    files = sorted(settings.folder.iterdir()) if settings.folder is not None else []
    return {path.name: loading.identity(path) for path in files if path.is_file() and LOADED.search(path.name)}


def load_configuration(settings: Teacher, run_dir: Path) -> PreTrainedConfig:
    """The teacher's configuration; RecipeError where it cannot be loaded or is not that of one of the families."""
    where = _where(settings, run_dir)
    config = loading.configuration(where, revision=_revision(settings), trust_remote_code=settings.trust_remote_code)
    if config.model_type not in families.MODEL_TYPES:
        raise RecipeError(
            f"teacher: {where} is a {config.model_type}; expected one of the families {', '.join(families.MODEL_TYPES)}"
        )
    family = families.of(config.model_type)
    for key in SIZES:
        if not getattr(config, key) >= 1:
            raise RecipeError(f"teacher: {where} has {key} {getattr(config, key)}; expected 1 or more")
    if config.hidden_act not in ACT2FN:
        raise RecipeError(
            f"teacher: {where} has hidden_act {config.hidden_act}; expected an activation of transformers"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(f"teacher: {where} has quantised weights; expected the weights before quantisation")
    loading.skeleton(where, lambda: family.model(config))
    return config


def tokenizer(recipe: Recipe, run_dir: Path) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer; for a teacher trained here, a byte-level BPE trained on the train split."""
    settings = recipe.teacher
    if settings.train is None:
        where, rows = _where(settings, run_dir), load_configuration(settings, run_dir).vocab_size
        return loading.tokenizer(where, rows, settings.trust_remote_code, revision=_revision(settings))
    folder = run_dir / "tokenizer"
    if not checkpoint.complete(folder):
        made = _train_tokenizer(recipe, settings.train.vocab_size)
        beside = checkpoint.partial(folder)
        beside.mkdir(parents=True, exist_ok=True)
        made.save_pretrained(beside)
        checkpoint.finish(folder)
    return AutoTokenizer.from_pretrained(folder)


def configuration(train: TeacherTraining, context_length: int, tokenizer) -> PreTrainedConfig:
    """The family's architecture at the recipe's size, for a tokenizer."""
    special = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return shape(train, context_length, len(tokenizer), **special)


def shape(train: TeacherTraining, context_length: int, vocab_size: int, **more) -> PreTrainedConfig:
    """The family's architecture at the recipe's size."""
    family = families.of(train.family)
    config = family.config(
        vocab_size=vocab_size,
        hidden_size=train.hidden_size,
        num_hidden_layers=train.num_layers,
        num_attention_heads=train.num_heads,
        max_position_embeddings=context_length,
        **family.trained(train),
        **more,
    )
    if family.block(config)["num_key_value_heads"] != (train.num_key_value_heads or train.num_heads):
        raise RecipeError(
            f"teacher.train.num_key_value_heads: found {train.num_key_value_heads}; expected nothing: in a "
            f"{train.family} each head of q has its own k and v"
        )
    turned = int(train.hidden_size // train.num_heads * config.rope_parameters.get("partial_rotary_factor", 1.0))
    if turned < 2 or turned % 2:
        raise RecipeError(
            f"teacher.train.num_heads: found {train.num_heads}; expected fewer: rotary positions turn {turned} "
            "channels of each head, and must turn an even number, 2 or more"
        )
    return config


@torch.no_grad()
def attention(model: PreTrainedModel, ids: Tensor, layers: Sequence[int]) -> tuple[dict, dict]:
    """Inputs and outputs of the attention of each of `layers`, both {layer: (batch, length, channel)}.

    The forward pass ends after the last of them.
    """

    def stop(module, args, output):
        raise _Deep

    with recording(model, layers) as recorded:
        last = _attentions(model)[max(layers)].register_forward_hook(stop)
        try:
            with contextlib.suppress(_Deep):
                _read(model, ids)
        finally:
            last.remove()
    return recorded


@contextlib.contextmanager
def recording(model: PreTrainedModel, layers: Sequence[int]):
    """Forward passes inside the context fill ({layer: input}, {layer: output}) of the attention of `layers`.

    Hooks, because `output_hidden_states` has blocks instead of mixers, and its last entry is after the final norm.
    """
    inputs, outputs = {}, {}

    def record(layer, module, args, kwargs, output):
        inputs[layer] = args[0] if args else kwargs["hidden_states"]
        outputs[layer] = output[0]

    with contextlib.ExitStack() as stack:
        for layer in layers:
            attention = _attentions(model)[layer]
            stack.callback(attention.register_forward_hook(functools.partial(record, layer), with_kwargs=True).remove)
        yield inputs, outputs


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids: Tensor, blocks: bool) -> tuple[Tensor, list[Tensor]]:
    """The input of the head (batch, length, channel), and with `blocks` the output of each block."""
    outputs = []
    with contextlib.ExitStack() as stack:
        for layer in families.of(model.config.model_type).blocks(model) if blocks else ():
            stack.callback(layer.register_forward_hook(lambda module, args, output: outputs.append(output)).remove)
        last = _read(model, ids).last_hidden_state
    return last, outputs


class _KeepsNothing(DynamicLayer):
    """The cache of a layer that is read once: keys and values pass through."""

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states


def _read(model, ids):
    """The body's outputs. Without a cache transformers looks for packed sequences, and waits for the device for it."""
    cache = Cache(layers=[_KeepsNothing() for _ in range(model.config.num_hidden_layers)])
    return model.base_model(input_ids=ids, cache=cache, use_cache=False)


def _attentions(model):
    return families.of(model.config.model_type).attentions(model)


class _Deep(Exception):
    """Raised to end a forward pass early."""


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


def _where(settings, run_dir):
    return settings.folder or (run_dir / "teacher" if settings.train else settings.name)


def _revision(settings):
    return settings.revision if settings.folder is None else None


def _write_card(run, model, history, folder):
    """The model card and `training.json`: training text, duration, and perplexity on held-out text."""
    recipe, train = run.recipe, run.recipe.teacher.train
    source = checkpoint.read_json(run.folder / "data" / "source.json")
    found = measure.held_out(model, run.blocks("test"))
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
        "architecture": f"{type(model).__name__}, {train.num_layers} layers, width {train.hidden_size}, "
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
                f"tags: [{train.family}]",
                "---",
                f"# {Path(recipe.run_dir).name}",
                "",
                "A small Transformer, made by a scavenger recipe to be a teacher.",
                "",
                "| | |",
                "|---|---|",
                *(f"| {key} | {value} |" for key, value in rows.items()),
                "",
            ]
        ),
    )
