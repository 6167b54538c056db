"""The one optimisation loop: step, clip, schedule, log, checkpoint, resume."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm import tqdm

from scavenger import losses
from scavenger.data import Batch
from scavenger.model.filters import ModalFilter
from scavenger.recipe import Recipe, RecipeError, Stage
from scavenger.run import checkpoint, interruption


BETAS = (0.9, 0.95)  # as GPT-NeoX and Pythia
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
FINAL_RATE = 0.1  # the cosine ends at this share of the learning rate, as Pythia's
UNITS = ("Attention", "Filter", "Mixer", "MLP")  # what FSDP gathers at once: losses call these without their layer
MOST_SKIPPED = 5  # steps in a row without a finite loss and gradient; one bad batch passes, a lost training does not


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module, Batch, object, Batch], tuple[Tensor, dict[str, Tensor]]],
    batch: Callable[[int], Batch],
    stage: Stage,
    steps_dir: Path,
    accelerator: Accelerator,
    recipe: Recipe,
    begins: int = 0,
    target: Callable[[Batch], object] = lambda part: None,
    watch: Callable[[], dict[str, float]] = dict,
    look: Callable[[nn.Module], float] | None = None,
    rest_rate: float = 1.0,
) -> tuple[list[dict], nn.Module]:
    """Train the parameters of `model` that require a gradient; returns the history, one entry per `log_every` steps,
    and what it trained, `model.model`: whole on the main process, wherever the launch keeps its parameters.

    `batch(step)` gives the global batch, of which each process takes its share in `accumulate` parts; `target(part)`
    what the teacher says to a part; `loss(model, part, target, whole)` the part's share of the whole batch's loss, so
    that shares add up to it, and likewise further values to log. Parameters outside mixers learn at `rest_rate` times
    the learning rate. Resumes from the newest whole checkpoint below `steps_dir`. `begins` is the step of the whole run
    at which this training begins: trackers want an axis that only goes on. What `watch()` finds in the parameters is
    logged with every checkpoint and at the end. Where `look` is given, what `look(model)` finds on held-out text, every
    `stage.look_every` steps, ends the training early once it is flat. Poles that a step put outside the unit circle are
    put back. A step whose loss or gradient is not finite is skipped and counted; MOST_SKIPPED in a row end it with a
    RecipeError.
    """
    optimizer = torch.optim.AdamW(_groups(model, rest_rate), lr=stage.learning_rate, betas=BETAS, fused=True)
    inner = model.model
    if accelerator.is_fsdp2:
        names = {type(module).__name__ for module in model.modules()}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [name for name in names if name.endswith(UNITS)]
    model, optimizer = accelerator.prepare(model, optimizer)
    start, history = checkpoint.resume_step(steps_dir, accelerator, recipe)
    # A checkpoint that a signal asked for lies between two entries of the log.
    if history and "since" in history[-1]:
        since = _Since(**history.pop()["since"]).shared(accelerator.num_processes)
    else:
        since = _Since(skipped=history[-1].get("skipped", 0) if history else 0)
    modal = [module for module in model.modules() if isinstance(module, ModalFilter)]
    clock = _Clock(accelerator.device, since.seconds or (history[-1]["seconds"] if history else 0.0))
    settings, parts = recipe.training, accelerator.num_processes * recipe.training.accumulate
    ended = _is_flat(stage, history)
    model.train()
    bar = tqdm(
        total=stage.steps,
        initial=start,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    with bar, interruption.postponed() as signal:
        for step in range(start, 0 if ended else stage.steps):
            clock.lap("checkpoints")  # and what was looked up for the log
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * learning_rate(stage, step)
            whole = batch(step)
            clock.lap("data")
            found, norm = {}, 0.0
            for part in _parts(whole, accelerator, settings.accumulate):
                aim = target(part)
                clock.lap("teacher")
                # What a loss draws is the same in every part and process, and after a resumption.
                torch.manual_seed(recipe.seed + 1_000_003 * (begins + step))
                with accelerator.accumulate(model):
                    value, logged = loss(model, part, aim, whole)
                    accelerator.backward(parts * value)  # which both accelerate and the processes' mean divide again
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM) or 0.0
                for key, item in {"loss": value, **logged}.items():
                    found[key] = found.get(key, 0.0) + item.detach().double()
            norm, value = float(norm), float(found["loss"])
            bad, stop = _agreed(accelerator, not (math.isfinite(norm) and math.isfinite(value)), signal.asked)
            if bad:
                optimizer.zero_grad()
                since.skip()
                lost = None
                if accelerator.distributed_type == DistributedType.DEEPSPEED:
                    lost = "and DeepSpeed has made the step"
                elif since.in_a_row == MOST_SKIPPED or step + 1 == stage.steps and not history and not since.steps:
                    lost = f"for {since.in_a_row} steps in a row"
                if lost is not None:
                    _give_up(name, stage, step, whole, value, norm, lost, steps_dir, accelerator)
            else:
                optimizer.step()
                optimizer.zero_grad()
                for filters in modal:
                    filters.stabilise()
                since.add(found, norm)
            clock.lap("student")
            bar.update()
            logs = (step + 1) % settings.log_every == 0 or step + 1 == stage.steps
            if logs and since.steps:
                entry = {"step": step + 1, "seconds": clock.seconds} | since.means(accelerator)
                before = max(start, history[-1]["step"] if history else 0)
                entry |= clock.rates(whole.ids.numel() * (step + 1 - before))
                if look is not None and (step + 1) % stage.look_every == 0:
                    entry["held_out"] = look(model)
                history.append(entry)
                ended = _is_flat(stage, history)
                if ended or (step + 1) % settings.checkpoint_every == 0 or step + 1 == stage.steps:
                    entry |= watch()
                since = _Since(skipped=since.skipped, in_a_row=since.in_a_row)
                _log(name, entry, learning_rate(stage, step), rest_rate, begins, accelerator)
                bar.set_postfix(loss=f"{entry['loss']:.4f}")
            elif step + 1 == stage.steps:  # the last entry says how far it went, learned or not
                history.append(history[-1] | {"step": step + 1, "skipped": since.skipped})
            done = ended or step + 1 == stage.steps
            if stop or not done and (step + 1) % settings.checkpoint_every == 0:
                unlogged = since.saved(clock.seconds, accelerator)
                checkpoint.save_step(steps_dir, step + 1, history + unlogged, accelerator, recipe)
            if stop:
                raise interruption.Stopped(f"{name}: stopped after step {step + 1} of {stage.steps}")
            if done:
                break
    accelerator.wait_for_everyone()
    inner = _whole(model, inner, accelerator)
    accelerator.free_memory()
    return history, inner


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from `learning_rate` to a tenth of it."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def is_spread(accelerator: Accelerator) -> bool:
    """Whether the launch keeps a part of the parameters on each process: FSDP, or DeepSpeed's third stage."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


class NextTokens(nn.Module):
    """The sum of -log q(next token) over the positions of a part that have a next one, of a teacher or a student."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head = model.lm_head.weight  # its own, too, so that a launch that shards parameters gathers it for us

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model.gpt_neox(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        following, counts = losses.following(ids, mask)
        one = torch.ones(1, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)

        def terms(logits, rows):
            return (losses.cross_entropy(logits, following[rows]) * counts[rows]).sum()[None]

        return losses.projected(hidden, self.head, terms, one)[0]


def next_token_loss(module: nn.Module, part: Batch, aim: None, whole: Batch) -> tuple[Tensor, dict]:
    """The part's share of the mean over the batch, nats per token."""
    return module(part.ids, part.mask) / losses.following(whole.ids, whole.mask)[1].sum(), {}


@dataclasses.dataclass
class _Since:
    """What has been seen since the last entry of the log."""

    sums: dict = dataclasses.field(default_factory=dict)
    norms: float = 0.0
    steps: int = 0
    skipped: int = 0  # of the whole training
    in_a_row: int = 0
    seconds: float = 0.0

    def add(self, found, norm):
        for key, item in found.items():
            self.sums[key] = self.sums.get(key, 0.0) + item
        self.norms += norm
        self.steps += 1
        self.in_a_row = 0

    def skip(self):
        self.skipped += 1
        self.in_a_row += 1

    def shared(self, processes):
        """What was saved, an equal share of which each process goes on with."""
        return dataclasses.replace(self, sums={key: item / processes for key, item in self.sums.items()})

    def means(self, accelerator):
        found = {key: _total(item, accelerator) / self.steps for key, item in self.sums.items()}
        return found | {"gradient_norm": self.norms / self.steps} | ({"skipped": self.skipped} if self.skipped else {})

    def saved(self, seconds, accelerator):
        """As an entry behind the log's last; none where the log is up to date."""
        if not self.steps and not self.in_a_row:
            return []
        sums = {key: _total(item, accelerator) for key, item in self.sums.items()}
        return [{"since": dataclasses.asdict(self) | {"sums": sums, "seconds": seconds}}]


class _Clock:
    """Where the time goes: on a GPU by events in its own queue, so that nothing waits to be timed."""

    def __init__(self, device, seconds):
        self.cuda = device.type == "cuda"
        self.before = seconds - time.monotonic()
        self.logged, self.marks = time.monotonic(), [(None, self._now())]

    @property
    def seconds(self):
        return time.monotonic() + self.before

    def lap(self, what):
        self.marks.append((what, self._now()))

    def rates(self, tokens):
        """Tokens a second since the last call, and the share of time in data, teacher, student and checkpoints."""
        spent = {}
        for (_, before), (what, after) in itertools.pairwise(self.marks):
            spent[what] = spent.get(what, 0.0) + self._between(before, after)
        now = time.monotonic()
        found = {"tokens_per_second": tokens / (now - self.logged)}
        found |= {f"time_in_{what}": seconds / sum(spent.values()) for what, seconds in spent.items()}
        self.logged, self.marks = now, self.marks[-1:]
        return found

    def _now(self):
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before, after):
        if not self.cuda:
            return after - before
        after.synchronize()
        return before.elapsed_time(after) / 1000


def _groups(model, rest_rate):
    """Matrices decay; biases, norms and all that shapes a filter do not. By name, which a loaded model shares."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = WEIGHT_DECAY if parameter.ndim >= 2 and "filter" not in name else 0.0
            share = 1.0 if ".mixer." in name else rest_rate
            groups.setdefault((share, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "share": share} for (share, decay), parameters in groups.items()
    ]


def _parts(whole, accelerator, count):
    """This process's share of the batch, in `count` parts; both divide every batch, which is checked at the launch."""
    first, stride = accelerator.process_index, accelerator.num_processes
    for part in range(count):
        rows = slice(first + part * stride, None, stride * count)
        yield Batch(whole.rows[rows], whole.ids[rows].to(accelerator.device), whole.mask[rows].to(accelerator.device))


def _whole(model, inner, accelerator):
    """`inner` with all its parameters; where the launch has spread them, one of its kind on the main process."""
    if not is_spread(accelerator):
        return inner
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return inner
    made = type(inner)(inner.config)
    made.load_state_dict({key.removeprefix("model."): item for key, item in weights.items() if key != "head"})
    return made


def _agreed(accelerator, *flags):
    """Each flag, raised where any process has raised it."""
    if accelerator.num_processes == 1:
        return flags
    found = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [count > 0 for count in accelerator.reduce(found, reduction="sum").tolist()]


def _total(value, accelerator):
    value = torch.as_tensor(value, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(value, reduction="sum").item()


def _is_flat(stage, history):
    """Whether the held-out error fell by less than `stage.flat` of itself between the last two looks."""
    looks = [entry["held_out"] for entry in history if "held_out" in entry]
    return len(looks) > 1 and looks[-1] > (1 - stage.flat) * looks[-2]


def _log(name, entry, rate, rest_rate, begins, accelerator):
    values = {f"{name}/{key}": item for key, item in entry.items() if key != "step"} | {f"{name}/learning_rate": rate}
    if rest_rate != 1:
        values[f"{name}/rest_learning_rate"] = rest_rate * rate
    accelerator.log(values, step=begins + entry["step"])


def _give_up(name, stage, step, whole, value, norm, lost, steps_dir, accelerator):
    """Keep what the batch was, for whoever wants to look at it, and end."""
    path = steps_dir.parent / "nonfinite.json"
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        # NaN is no JSON: as text.
        found = {"stage": name, "step": step + 1, "loss": str(value), "gradient_norm": str(norm)}
        checkpoint.write_json(path, found | {"rows": whole.rows.tolist()})
    raise RecipeError(
        f"{name}: loss {value:.3g}, gradient norm {norm:.3g} at step {step + 1}, {lost}; expected finite ones: lower "
        f"the learning rate ({stage.learning_rate}); the batch is named in {path}, the last checkpoint is intact"
    )
