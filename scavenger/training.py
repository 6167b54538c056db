"""The one optimisation loop: step, clip, schedule, log, checkpoint, resume."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm import tqdm

from scavenger import flops, losses
from scavenger.data import Batch
from scavenger.model.attention import WindowedAttention
from scavenger.model.filters import ImplicitFilter, ModalFilter
from scavenger.model.hyena import HyenaMixer
from scavenger.model.modeling_hyena import MLP
from scavenger.model.precision import tensor_cores
from scavenger.recipe import RecipeError, Stage
from scavenger.run import checkpoint, interruption
from scavenger.run.run import Run


BETAS = (0.9, 0.95)  # as Pythia and most models of its kind
WEIGHT_DECAY = 0.01
HEAD = ("head", "head_bias")  # parameters that the trained modules name a second time, beside their model
MAX_GRADIENT_NORM = 1.0
FINAL_RATE = 0.1  # the cosine ends at this share of the learning rate, as Pythia's
UNITS = ("Attention", "Filter", "Mixer", "MLP")  # FSDP units: the losses call these modules without their layer
MOST_SKIPPED = 5  # consecutive steps without a finite loss and gradient: one bad batch passes, a lost training does not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimisation:
    """One training: the module, its data, its loss, and what is logged with it.

    `batch(step)` returns the global batch; each process takes its share of it in `training.accumulate` micro-batches.
    `target(part)` returns the teacher's outputs for a micro-batch. `loss(module, part, target, whole)` returns that
    micro-batch's contribution to the loss of the global batch `whole` (contributions add up to it), and further values
    to log. `watch(module)` returns values that are logged with every checkpoint and at the end.
    """

    name: str  # in the log, on the progress bar and in messages
    module: "Trained"
    settings: Stage
    steps_dir: Path  # of the step checkpoints
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch, object, Batch], tuple[Tensor, dict[str, Tensor]]]
    target: Callable[[Batch], object] = lambda part: None
    watch: Callable[[nn.Module], dict[str, float]] = lambda module: {}
    look: Callable[[nn.Module], float] | None = None  # held-out error; the training ends once it no longer falls
    rest_rate: float = 1.0  # learning rate outside the mixers, as a multiple of the mixers'
    flops: float = 0.0  # of a token, for the log; 0: not counted
    first_step: int = 0  # steps of the run before this training: trackers need an axis that only grows


@tensor_cores()
def train(run: Run, optimisation: Optimisation) -> tuple[list[dict], nn.Module]:
    """Train the parameters of `optimisation.module` that require a gradient.

    Returns the history, one entry per `log_every` steps, and the trained model, complete on the main process however
    the launch shards its parameters. Resumes from the newest intact checkpoint below `optimisation.steps_dir`. Poles
    that a step moved out of the unit circle are moved back. A step with a non-finite loss or gradient is skipped and
    counted; MOST_SKIPPED in a row raise RecipeError.

    On a GPU nothing waits for a step: the next batch is read beside it, the update skips itself on the device, and what
    the host knows of a step it learns after the next one was begun, or where something is logged.
    """
    accelerator, settings, stage = run.accelerator, run.recipe.training, optimisation.settings
    ahead = runs_ahead(accelerator)
    module, optimizer = _prepared(optimisation, accelerator, settings)
    modal = [part for part in module.modules() if isinstance(part, ModalFilter)]
    start, history = checkpoint.resume_step(run, optimisation.steps_dir)
    since = _Since.resumed(history, accelerator)
    peak = flops.peak(accelerator) if optimisation.flops else None
    clock = _Clock(accelerator.device, since.seconds or (history[-1]["seconds"] if history else 0.0))
    ended = _is_flat(stage, history)
    module.train()
    bar = _progress_bar(optimisation, start, accelerator)
    steps = range(start, 0 if ended else stage.steps)
    batches = contextlib.closing(_batches(optimisation, steps, accelerator, settings.accumulate, ahead))
    unknown = deque()  # steps whose outcome the host has not looked at
    graphs = compiled(module) if settings.compile else contextlib.nullcontext()
    with bar, graphs, interruption.postponed() as signal, batches as batches:
        for step in steps:
            clock.lap("checkpoints")  # includes the values that are logged with them
            _set_learning_rate(optimizer, stage, step)
            whole, parts = next(batches)
            clock.lap("data")
            found, norm = _gradients(run, optimisation, module, step, whole, parts, clock)
            outcome = _Outcome(accelerator, step, whole, found["loss"], norm, signal.asked)
            since.add(found, norm, outcome.bad)
            last, due = step + 1 == stage.steps, (step + 1) % settings.checkpoint_every == 0
            logged_now = last or (step + 1) % settings.log_every == 0
            stopped, bad = False, False
            if ahead:
                optimizer.optimizer.found_inf = outcome.bad  # the fused update makes no step where it is 1
                optimizer.step()
            unknown.append(outcome)
            while unknown and (len(unknown) > 1 or not ahead or logged_now or stopped):
                known = unknown.popleft()
                value, value_norm, bad, asked = known.looked_at()
                stopped = stopped or asked
                since.count(bad)
                if bad:
                    _give_up_if_lost(run, optimisation, known.step, known.whole, since, value, value_norm, not history)
            if not ahead and not bad:
                optimizer.step()
            for filters in modal:
                filters.stabilise()
            optimizer.zero_grad()
            clock.lap("student")
            bar.update()
            if logged_now and since.steps:
                logged = max(start, history[-1]["step"] if history else 0)
                entry = {"step": step + 1, "seconds": clock.seconds} | since.means(accelerator)
                entry |= clock.rates(whole.ids.numel() * (step + 1 - logged))
                if optimisation.flops:
                    entry["mfu"] = optimisation.flops * entry["tokens_per_second"] / peak
                if optimisation.look is not None and (step + 1) % stage.look_every == 0:
                    entry["held_out"] = optimisation.look(module)
                history.append(entry)
                ended = _is_flat(stage, history)
                if ended or due or last:
                    entry |= optimisation.watch(module)
                since = since.emptied()
                _log(optimisation, entry, learning_rate(stage, step), accelerator)
                bar.set_postfix(loss=f"{entry['loss']:.4f}")
            elif last:  # the last entry has the last step, even if that was skipped
                history.append(history[-1] | {"step": step + 1, "skipped": since.skipped})
            ended = ended or last
            if stopped or (due and not ended):
                unlogged = since.saved(clock.seconds, accelerator)
                checkpoint.save_step(run, optimisation.steps_dir, step + 1, history + unlogged)
            if stopped:
                raise interruption.Stopped(f"{optimisation.name}: stopped after step {step + 1} of {stage.steps}")
            if ended:
                break
    accelerator.wait_for_everyone()
    trained = _gathered(module, optimisation.module.model, accelerator)
    accelerator.free_memory()
    return history, trained


def _prepared(optimisation, accelerator, settings):
    """The module and its optimizer, wrapped for the launch."""
    module = optimisation.module
    if settings.checkpoint_activations:
        checkpoint_activations(module)
    groups = _groups(module, optimisation.rest_rate)
    optimizer = torch.optim.AdamW(groups, lr=optimisation.settings.learning_rate, betas=BETAS, fused=True)
    if accelerator.is_fsdp2:
        names = {type(part).__name__ for part in module.modules()}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [name for name in names if name.endswith(UNITS)]
    return accelerator.prepare(module, optimizer)


def checkpoint_activations(module: nn.Module):
    """From now on each layer of `module.model` keeps only its input, and is computed again in the backward pass.

    Source: arXiv:1604.06174.
    """
    module.model.activation_checkpointing_enable({"use_reentrant": False})  # losses take outputs from inside of layers


@contextlib.contextmanager
def compiled(module: nn.Module):
    """Inside, a student's mixers and MLPs are compiled graphs where gradients are computed; layers alike share them.

    Filters and modal states stay outside of the graphs, in which they would be rounded to TF32.
    """
    replaced = []
    for part in module.modules():
        if isinstance(part, (HyenaMixer, WindowedAttention, MLP)):
            replaced.append(
                (part, "forward", _where_gradients(torch.compile(part.forward, dynamic=False), part.forward))
            )
        if isinstance(part, (ImplicitFilter, ModalFilter)):
            replaced.append((part, "forward", torch.compiler.disable(part.forward)))
        if isinstance(part, HyenaMixer):
            replaced.append((part, "_scan", torch.compiler.disable(part._scan)))
    for part, name, call in replaced:
        setattr(part, name, call)
    try:
        yield
    finally:
        for part, name, _ in replaced:
            delattr(part, name)


def _where_gradients(graph, call):
    """Measurements have shapes of their own, each of which would be compiled."""
    return lambda *words: graph(*words) if torch.is_grad_enabled() else call(*words)


def _progress_bar(optimisation, start, accelerator):
    return tqdm(
        total=optimisation.settings.steps,
        initial=start,
        desc=optimisation.name,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )


def _set_learning_rate(optimizer, stage, step):
    for group in optimizer.param_groups:
        group["lr"] = group["share"] * learning_rate(stage, step)


def _gradients(run, optimisation, module, step, whole, parts, clock):
    """Forward and backward pass of this process's micro-batches; returns the values to log and the gradient norm."""
    accelerator = run.accelerator
    count = accelerator.num_processes * len(parts)
    found, norm = {}, None
    for part in parts:
        part = Batch(part.rows, *(x if x is None else x.to(accelerator.device, non_blocking=True) for x in part[1:]))
        target = optimisation.target(part)
        clock.lap("teacher")
        # The same random numbers in every micro-batch and process, and after a resumption.
        torch.manual_seed(run.recipe.seed + 1_000_003 * (optimisation.first_step + step))
        with accelerator.accumulate(module):
            with accelerator.autocast():  # under FSDP2 accelerate's `prepare` does not do it
                value, logged = optimisation.loss(module, part, target, whole)
            # accelerate divides by the micro-batches, data parallelism by the processes.
            accelerator.backward(count * value)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
        for key, item in {"loss": value, **logged}.items():
            found[key] = found.get(key, 0.0) + item.detach().double()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
    norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float64, device=accelerator.device)
    return found, norm


def _give_up_if_lost(run, optimisation, step, whole, since, value, norm, unlogged):
    """Raise RecipeError where a skipped step ends the training; keeps the batch's rows for inspection."""
    stage, accelerator = optimisation.settings, run.accelerator
    last_chance = step + 1 == stage.steps and unlogged and not since.steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        why = "and DeepSpeed has already made the step"
    elif since.in_a_row == MOST_SKIPPED or last_chance:
        why = f"for {since.in_a_row} steps in a row"
    else:
        return
    path = optimisation.steps_dir.parent / "nonfinite.json"
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        # JSON has no NaN: as text.
        facts = {"stage": optimisation.name, "step": step + 1, "loss": str(value), "gradient_norm": str(norm)}
        checkpoint.write_json(path, facts | {"rows": whole.rows.tolist()})
    raise RecipeError(
        f"{optimisation.name}: found loss {value:.3g}, gradient norm {norm:.3g} at step {step + 1}, {why}; expected "
        f"finite numbers: lower the learning rate ({stage.learning_rate}); the batch is named in {path}, the last "
        "checkpoint is intact"
    )


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from `learning_rate` to a tenth of it."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def runs_ahead(accelerator: Accelerator) -> bool:
    """Whether the host prepares the next step while the device makes one: on a GPU, with whole parameters.

    The updates of FSDP and DeepSpeed do not skip themselves on the device.
    """
    own = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return accelerator.device.type == "cuda" and own


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the launch shards the parameters over the processes: FSDP, or DeepSpeed's third stage."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


class Trained(nn.Module):
    """Computes a loss of `model`, which is trained; the one entry to it where a launch shards its parameters.

    `module(…)` is `loss(…)`; `module(look=look)` is `look()`, which may call the model and its parts.
    """

    model: nn.Module

    def forward(self, *words, look: Callable[[], object] | None = None):
        return self.loss(*words) if look is None else look()


class NextTokens(Trained):
    """Σ -log q(next token) over the `predicted` tokens of a micro-batch, of a teacher or a student."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # Parameters of this module too, so that sharded launches gather them.
        self.head, self.head_bias = losses.Head.of(model)

    def loss(self, ids: Tensor, predicted: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        following, counts = losses.following(ids, predicted)
        one = torch.ones(1, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        return losses.projected(hidden, losses.Head(self.head, self.head_bias), losses.Terms(following, counts), one)[0]


def next_token_loss(module: nn.Module, part: Batch, target: None, whole: Batch) -> tuple[Tensor, dict]:
    """The micro-batch's contribution to the mean over the predicted tokens of the global batch, nats per token."""
    count = losses.following(whole.ids, whole.predicted)[1].sum()
    return module(part.ids, part.predicted) / count.clamp_min(1), {}  # 0 where the batch has no such token


class _Outcome:
    """What is to be known of a step: loss, gradient norm, whether to skip it, whether to stop; copied without waiting.

    A step is bad where the loss or the gradient of any process is no finite number.
    """

    def __init__(self, accelerator, step, whole, loss, norm, asked):
        self.step, self.whole = step, whole
        own = torch.stack([~(loss.isfinite() & norm.isfinite()), torch.full_like(loss, asked, dtype=torch.bool)])
        flags = own.float()
        if accelerator.num_processes > 1:
            flags = (accelerator.reduce(flags, reduction="sum") > 0).float()
        self.bad = flags[0]  # () 1 or 0
        self.facts = torch.cat([torch.stack([loss, norm]), flags.double()]).to("cpu", non_blocking=True)
        self.copied = None
        if accelerator.device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()

    def looked_at(self) -> tuple[float, float, bool, bool]:
        """Loss, gradient norm, whether the step is bad, whether to stop; waits until the device has made the step."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm, bad, asked = self.facts.tolist()
        return loss, norm, bad > 0, asked > 0


@dataclasses.dataclass
class _Since:
    """Sums over the steps since the last entry of the log, on the device."""

    sums: dict = dataclasses.field(default_factory=dict)
    norms: Tensor | float = 0.0
    steps: int = 0
    skipped: int = 0  # of the whole training
    in_a_row: int = 0
    seconds: float = 0.0

    @classmethod
    def resumed(cls, history, accelerator):
        """What a checkpoint kept; its unlogged sums, if it has any, are taken off the end of the history."""
        if not history or "since" not in history[-1]:
            return cls(skipped=history[-1].get("skipped", 0) if history else 0)
        since = cls(**history.pop()["since"])
        share = {key: item / accelerator.num_processes for key, item in since.sums.items()}
        return dataclasses.replace(since, sums=share)

    def add(self, found, norm, bad):
        """The values of a step; nothing of a bad one."""
        good = bad == 0
        for key, item in found.items():
            self.sums[key] = self.sums.get(key, 0.0) + torch.where(good, item, 0.0)
        self.norms = self.norms + torch.where(good, norm, 0.0)

    def count(self, bad):
        """A step whose outcome is known."""
        if bad:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.steps += 1
            self.in_a_row = 0

    def emptied(self):
        """After an entry of the log."""
        return _Since(skipped=self.skipped, in_a_row=self.in_a_row)

    def means(self, accelerator):
        found = {key: _total(item, accelerator) / self.steps for key, item in self.sums.items()}
        skipped = {"skipped": self.skipped} if self.skipped else {}
        return found | {"gradient_norm": float(self.norms) / self.steps} | skipped

    def saved(self, seconds, accelerator):
        """As an extra entry at the end of a checkpoint's history; none where everything is logged."""
        if not self.steps and not self.in_a_row:
            return []
        sums = {key: _total(item, accelerator) for key, item in self.sums.items()}
        kept = {"sums": sums, "norms": float(self.norms), "seconds": seconds}
        return [{"since": dataclasses.asdict(self) | kept}]


class _Clock:
    """Shares of the time by what it was spent on; on a GPU by CUDA events, so that timing does not synchronise."""

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
        """Tokens per second since the last call, and the time shares of data, teacher, student and checkpoints."""
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
    """Parameter groups: matrices have weight decay; biases, norms and everything that shapes a filter do not."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = WEIGHT_DECAY if parameter.ndim >= 2 and "filter" not in name else 0.0
            share = 1.0 if ".mixer." in name else rest_rate
            groups.setdefault((share, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "share": share} for (share, decay), parameters in groups.items()
    ]


def _batches(optimisation, steps, accelerator, accumulate, ahead) -> Iterator[tuple[Batch, list[Batch]]]:
    """Each step's batch, and this process's micro-batches of it; `ahead`: a thread reads the next one meanwhile."""

    def read(step):
        whole = optimisation.batch(step)
        return whole, list(_micro_batches(whole, accelerator, accumulate))

    if not ahead:
        yield from map(read, steps)
        return
    with ThreadPoolExecutor(1) as thread:
        following = None
        for step in steps:
            now = following or thread.submit(read, step)
            found = now.result()
            following = thread.submit(read, step + 1) if step + 1 in steps else None
            yield found


def _micro_batches(whole, accelerator, count):
    """This process's share of the batch, in `count` micro-batches of one size (processes.start checks that)."""
    first, stride = accelerator.process_index, accelerator.num_processes
    for part in range(count):
        rows = slice(first + part * stride, None, stride * count)
        tensors = [item if item is None else item[rows] for item in whole[1:]]
        if accelerator.device.type == "cuda":  # only from pinned memory does the device copy by itself
            tensors = [item if item is None else item.pin_memory() for item in tensors]
        yield Batch(whole.rows[rows], *tensors)


def _gathered(module, model, accelerator):
    """The trained model with all its parameters; where the launch shards them, a new one on the main process."""
    if not is_sharded(accelerator):
        return model
    weights = accelerator.get_state_dict(module)
    if not accelerator.is_main_process:
        return model
    made = type(model)(model.config)
    made.load_state_dict({key.removeprefix("model."): item for key, item in weights.items() if key not in HEAD})
    return made


def _total(value, accelerator):
    value = torch.as_tensor(value, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(value, reduction="sum").item()


def _is_flat(stage, history):
    """Whether the held-out error fell by less than the share `stage.flat` between the last two measurements."""
    looks = [entry["held_out"] for entry in history if "held_out" in entry]
    return len(looks) > 1 and looks[-1] > (1 - stage.flat) * looks[-2]


def _log(optimisation, entry, rate, accelerator):
    name, rest_rate = optimisation.name, optimisation.rest_rate
    values = {f"{name}/{key}": item for key, item in entry.items() if key != "step"} | {f"{name}/learning_rate": rate}
    if rest_rate != 1:
        values[f"{name}/rest_learning_rate"] = rest_rate * rate
    accelerator.log(values, step=optimisation.first_step + entry["step"])
