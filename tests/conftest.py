"""Seeds, the tiny models and folders that several tests share, and commands called in this process."""

import contextlib
import gc
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of pytest share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from filelock import FileLock


if not torch.cuda.is_available():  # before Triton is imported: its kernels are interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.model.attention import WindowedAttention
from scavenger.report import contenders


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHED = os.environ | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "launching")]),
    "TORCH_COMPILE_DISABLE": "1",  # as `without_compiler`
}
ARC = "".join(  # questions as they are found in files, for arc_easy.jsonl
    json.dumps({"query": f"Question: Which is {word}?", "choices": ["grass", f"the {word}", "coal"], "gold": 1}) + "\n"
    for word in ("sky", "sea", "sun", "ice", "fog", "dew", "ash")
)


class Done(NamedTuple):
    """What a command returned and printed, in the names of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def importing_from(folder):
    """Scripts of `folder` import each other, as Python lets them; those of another folder may have the same names."""
    names = [path.stem for path in folder.glob("*.py")]
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        try:
            yield
        finally:
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(others)


def command(script, *words):
    """A command of eval/ as typed in the project's folder, called in this process."""
    path = ROOT / script
    with importing_from(path.parent):
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with contextlib.chdir(ROOT):
            return done(module.main, words)


def command_line(*words):
    """`scavenger WORDS`, called in this process."""
    from scavenger.__main__ import main

    return done(main, words)


def launch(*words, **options):
    """A command line as a person types it in the project's folder, in processes of its own."""
    words = [str(word) for word in words]
    return subprocess.run(words, capture_output=True, text=True, **{"cwd": ROOT, "env": LAUNCHED} | options)


def done(main, words):
    """Call `main(words)`; None stands for what sys.argv holds."""
    out, err = io.StringIO(), io.StringIO()
    with one_core(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(None if words is None else [str(word) for word in words])
        except SystemExit as ended:  # argparse
            code = ended.code
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def one_core():
    """A run takes one thread instead of every core of the machine, and leaves the environment as it was."""
    with mock.patch.object(os, "sched_getaffinity", lambda process: {0}), mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True, scope="session")
def without_compiler():
    """A report compiles the teacher for seconds a shape; tests that need it say so. Yields what is replaced."""
    whole = contenders.compiles
    with mock.patch.object(contenders, "compiles", lambda: False):
        yield whole


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Texts of tests are short; their scans have several chunks."""
    monkeypatch.setattr("scavenger.model.modal.HEAD_CHUNK", 64)


def pytest_collection_finish():
    """What is imported by now is not looked through by every `gc.collect()` of a report."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call():
    """Seed again: after the fixtures, pytest-randomly has DeepSpeed seed torch with another number in each run."""
    torch.manual_seed(7)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test computes. Models and numbers are made on the CPU and then moved: the same on every device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def normal(*shape, device):
    """Normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64).to(device)


def random_ids(*shape, low=0, device):
    """Tokens of the tiny models' vocabulary, from `low` on."""
    return torch.randint(low, 97, shape).to(device)


# What takes a second or more: tests of runs, launches, commands and timings. Others are marked where they stand.
SLOW_MODULES = {
    *(
        "test_benchmarks",
        "test_comparison",
        "test_continuation",
        "test_eval_transfer",
        "test_faults",
        "test_foreign",
        "test_hub",
    ),
    *(
        "test_huggingface",
        "test_launchers",
        "test_likelihood",
        "test_lm_eval_tasks",
        "test_loading",
        "test_packaging",
        "test_page",
        "test_pipeline",
    ),
    *("test_plan", "test_ranking", "test_readme", "test_recipes", "test_recurrence", "test_retrieval", "test_serve"),
    "test_timing",
}
SLOW_FIXTURES = {"workshop", "finished"}
# Their single tests take up to two minutes: they come first, so that no worker is left with one at the end.
LONGEST_MODULES = {"test_readme", "test_launchers"}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.module.__name__ in SLOW_MODULES or not SLOW_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    yield
    items.sort(key=lambda item: item.module.__name__ not in LONGEST_MODULES)  # within each part the order is kept


GPU_DESELECTED = pytest.StashKey[int]()


def pytest_deselected(items):
    for item in items:
        item.config.stash[GPU_DESELECTED] = item.config.stash.get(GPU_DESELECTED, 0) + ("gpu" in item.keywords)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["gpu_deselected"] = session.config.stash.get(GPU_DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker of pytest-xdist collects, and deselects, the same tests."""
    node.config.stash[GPU_DESELECTED] = getattr(node, "workeroutput", {}).get("gpu_deselected", 0)


def pytest_terminal_summary(terminalreporter, config):
    skipped = sum("gpu" in report.keywords for report in terminalreporter.stats.get("skipped", []))
    for count, why in (
        (config.stash.get(GPU_DESELECTED, 0), "pytest -m gpu runs them on a CUDA device"),
        (skipped, "no CUDA device"),
    ):
        if count:
            terminalreporter.write_line(f"{count} gpu tests left out: {why}")


def tiny_teacher(**changes):
    """3 layers, 5 heads of width 6 (2 of them turned): no two sizes are equal, none is a power of two."""
    config = GPTNeoXConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 30,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "intermediate_size": 44,
            "max_position_embeddings": 63,
            "rotary_pct": 0.4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        | changes
    )
    torch.manual_seed(3)
    return GPTNeoXForCausalLM(config).double().eval()


# A student's shape that differs from tiny_teacher's in all that it can: 6 heads of q share 2 of k and v, 10 channels
# each, which do not add up to the width.
GROUPED = {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rotary_channels": 4,
    "rotary_scaling": 1.3,
    "embedding_scale": 5.5,
    "qk_norm": True,
    "norm": "rms",
    "mlp": "gated",
    "hidden_act": "silu",
    "parallel_residual": False,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "head_bias": True,
}
GROUPED_SHAPES = [
    {"filters": 2, **GROUPED},
    {"filters": 4, **GROUPED},  # groups of 5 channels, half a head, whose first 4 are turned
    {"filters": 20, **GROUPED, "hyena_order": 3},
    {"filters": 6, **GROUPED, "share_state": False},
    {"filters": 2, **GROUPED, "attention_layers": [0, 2], "attention_window": 7, "sliding_windows": [3, 0, 0]},
]


def tiny_student(filters=5, modal=False, **changes):
    """A student of the tiny teacher's shape, in float64; `filters` 5 is multihyena by head, 30 is hyena."""
    count = filters * changes.get("hyena_order", 1)
    sizes = (
        {
            "filter": "modal",
            "state_sizes": [
                [1 + (3 * layer + filter) % 4 for filter in range(count)]
                for layer in range(changes.get("num_hidden_layers", 3))
            ],
        }
        if modal
        else {}
    )
    config = HyenaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 30,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "intermediate_size": 44,
            "num_filters": filters,
            "filter_width": 11,
            "position_features": 9,
            "context_length": 63,
            "rotary_channels": 2,
        }
        | sizes
        | changes
    )
    if config.state_sizes is not None:  # a layer with kept heads has fewer filters
        config.state_sizes = [own[: config.filters(layer)] for layer, own in enumerate(config.state_sizes)]
    torch.manual_seed(5)
    model = HyenaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            mixer = layer.mixer
            for linear in (mixer.q, mixer.k, mixer.v, mixer.out):
                linear.weight.mul_(20)  # large enough that a wrong mixer shows in the logits
            if config.qk_norm:
                for norm in (mixer.q_norm, mixer.k_norm):
                    norm.weight.add_(0.3 * torch.randn_like(norm.weight))
            if isinstance(mixer, WindowedAttention):
                continue
            mixer.short_filter.add_(0.3 * torch.randn_like(mixer.short_filter))
            if mixer.gates is not None:
                mixer.gates.weight.normal_(std=0.5)
            if mixer.join is not None:
                mixer.join.weight.normal_(std=0.5)
            if mixer.features is not None:
                for matrix in (mixer.features.q, mixer.features.k):
                    matrix.normal_()
            if not mixer.num_filters:
                continue
            if config.positive:
                mixer.filter.log_rate.uniform_(-4, 0.5)
                mixer.filter.log_weight.normal_()
                continue
            mixer.filter.direct.normal_()
            if modal:
                radius = 0.5 + 0.49 * torch.rand(len(mixer.filter.pole), dtype=torch.float64)
                mixer.filter.pole.copy_(torch.view_as_real(torch.polar(radius, 3 * torch.rand_like(radius))))
                mixer.filter.residue.normal_()
    return model


def shape_of(family, **changes):
    """3 layers of width 48 with 6 heads; 3 heads of k and v, of 10 channels, where the family's may be so."""
    from scavenger import teacher
    from scavenger.recipe import TeacherTraining

    sizes = {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "vocab_size": 300}
    train = TeacherTraining(family=family, steps=1, batch_size=1, learning_rate=1e-3, **sizes)
    config = teacher.shape(train, 63, 97, bos_token_id=0, eos_token_id=0)
    fields = {name for kind in type(config).__mro__ for name in getattr(kind, "__annotations__", ())}
    own = {"num_key_value_heads": 3, "head_dim": 10, "pad_token_id": 0}
    return type(config).from_dict(
        config.to_dict() | {key: value for key, value in own.items() if key in fields} | changes
    )


def tiny_of(family, **changes):
    """A teacher with random weights, norms and biases too."""
    from scavenger import families

    torch.manual_seed(3)
    model = families.of(family).model(shape_of(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class Graphs:
    """A backend of torch.compile that counts the graphs it is given and runs them without generating code."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs, **options):
        self.count += 1
        return aot_eager(graph, inputs)


def shared(tmp_path_factory, name, make):
    """A folder made once for all workers of pytest, by the first that needs it; tests copy what they change."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers of this run of pytest
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.made").exists():
            make(folder)
            (root / f"{name}.made").touch()
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with a small teacher, some real text and a recipe that uses them, all stages in it."""
    return shared(tmp_path_factory, "workshop", make_workshop)


QUICKSTART = "accelerate launch recipes/quickstart.yaml"
SMALL = [
    "transfer.activations.steps=8",
    "transfer.activations.warmup_steps=2",
    "transfer.activations.batch_size=2",
    "transfer.logits.steps=8",
    "transfer.logits.warmup_steps=2",
    "transfer.logits.batch_size=2",
    "baseline.warmup_steps=2",
    "data.evaluation_tokens=1024",
    "recurrence.max_state_size=4",
    "report.context_lengths=[16, 64]",
    "report.cases=[2x16+4]",
    "report.sample_tokens=8",
    "report.examples=4",
    "report.prompts=3",
    "report.rounds=1",
]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A run of the quickstart with smaller numbers, and what it printed. All stages, on the standard library's text."""

    def make(folder):
        made = launch(*QUICKSTART.split(), f"run_dir={folder}/run", *SMALL)
        assert made.returncode == 0, made.stderr
        (folder / "printed").write_text(made.stdout)

    folder = shared(tmp_path_factory, "quickstart", make)
    return folder / "run", (folder / "printed").read_text()


def make_workshop(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from scavenger import data

    folder.mkdir()
    texts = [
        path.read_text(encoding="utf-8", errors="replace")[:6000] for path in list(data.stdlib_files().values())[:240]
    ]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts[:40],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>").save_pretrained(
        folder / "teacher"
    )
    tiny_teacher(vocab_size=320, rotary_pct=0.34).float().save_pretrained(folder / "teacher")
    (folder / "recipe.yaml").write_text(f"""#!/usr/bin/env scavenger
run_dir: {folder}/run
teacher: {{path: {folder}/teacher}}
data: {{path: {folder}/text.jsonl, context_length: 48, evaluation_tokens: 960}}
student: {{filter: {{filter_width: 8, position_features: 5, sine_frequency: 2.0}}}}
training: {{log_every: 2, checkpoint_every: 4}}
transfer:
  activations: {{steps: 10, batch_size: 4, learning_rate: 1e-2}}
  logits: {{steps: 10, batch_size: 4, learning_rate: 1e-2}}
baseline: {{learning_rate: 3e-3}}
recurrence: {{tolerance: 1e-3, max_state_size: 40}}
report: {{context_lengths: [20, 60], sample_tokens: 5, prompts: 2, examples: 3, rounds: 1}}
""")
    (folder / "recipe.yaml").chmod(0o755)


def scavenger(recipe, *overrides, plan=False):
    """Run a recipe in this process; no step is timed for a plan."""
    from scavenger import plan as planning
    from scavenger.__main__ import run
    from scavenger.recipe import load_recipe

    with one_core(), mock.patch.object(planning, "timed", lambda *words: (1.0, 1.0, None)):
        assert run(load_recipe(str(recipe), list(overrides)), plan) == 0


@pytest.fixture(scope="session")
def finished(workshop, tmp_path_factory):
    """The run folder of the workshop's recipe, all stages done; not to be written to."""
    shared(tmp_path_factory, "finished", lambda folder: scavenger(workshop / "recipe.yaml"))
    return workshop / "run"


@pytest.fixture
def own_run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    run = tmp_path / "own_run"
    shutil.copytree(finished, run)
    saved = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(saved.replace(str(finished), str(run)))
    return run


@pytest.fixture(scope="session")
def evaluated(workshop, finished):
    """The workshop's teacher, and its distilled and its recurrent student, as evaluations take them."""
    from scavenger.report.evaluated import Evaluated

    folders = {
        "teacher": workshop / "teacher",
        "distilled": finished / "transfer",
        "recurrent": finished / "recurrence",
    }
    return [Evaluated(label, str(folder)) for label, folder in folders.items()]


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interpreted(request, monkeypatch):
    """On the CPU the kernels run in Triton's interpreter, which alone would multiply the bits of bfloat16."""
    if "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda":
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a CUDA device, for which Triton compiles: pytest -m gpu")
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *others: product(self, widened(a), widened(b), *others)
    )


class Kernel:
    """A kernel of Triton that keeps the arguments of its launches, and runs or not."""

    def __init__(self, kernel, runs):
        self.kernel, self.runs, self.launches = kernel, runs, []

    def __getitem__(self, grid):
        def launch(*given, **constants):
            self.launches.append(given)
            if self.runs:
                self.kernel[grid](*given, **constants)

        return launch


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel on a GPU, and those for which the host waits."""

    VIEWS = {"view", "_unsafe_view", "expand", "select", "slice", "t", "transpose", "unsqueeze", "squeeze", "detach",
             "alias", "split", "split_with_sizes", "unbind", "permute", "as_strided", "new_empty", "empty", "unfold",
             "lift_fresh", "empty_like", "_reshape_alias", "new_empty_strided", "promote_types"}  # fmt: skip
    WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal"}

    def __init__(self):
        super().__init__()
        self.launched, self.waited = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITS:
            self.waited.append(name)
        elif name not in self.VIEWS:
            self.launched.append(name)
        return function(*args, **(kwargs or {}))


def watched(monkeypatch, module, names, runs=True):
    """Kernels of a module, which take their place."""
    kernels = [Kernel(getattr(module, name), runs) for name in names]
    for name, kernel in zip(names, kernels, strict=True):
        monkeypatch.setattr(module, name, kernel)
    return kernels


def compiled(module, kernels, capability):
    """Bytes of shared memory of kernels, as tests/compiled_triton.py takes them, on GPUs of that compute capability."""
    words = [sys.executable, "tests/compiled_triton.py", module.__name__, json.dumps(kernels), capability]
    done = launch(*words, env=LAUNCHED | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
