"""Every test sees eight CPU devices and a compilation cache that outlives the run; many share ways to load a model."""

import importlib.util
import os
import pathlib

import jaxlib

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Compiling is most of the run's time. Without LLVM's optimisations it takes half as long, without MLIR a quarter, and
# the tests are small. Later versions, of which libtpu is one, know no way around MLIR, and end a process that asks.
_CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_CHEAP += " --xla_cpu_parallel_codegen_split_count=1"  # cores are busy with other tests
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11) and importlib.util.find_spec("libtpu") is None:
    _CHEAP += " --xla_cpu_use_fusion_emitters=false"

os.environ["XLA_FLAGS"] = f"{_CHEAP} --xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "true")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where in the source an operation stands, nobody asks
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools  # noqa: E402
import gc  # noqa: E402
import signal  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

import adapttoken_jax as at  # noqa: E402

_MAPPINGS = pathlib.Path("/proc/self/maps")
_MANY = 15_000  # Linux allows a process 65 530

# Whoever runs the tests in the background has Ctrl-C ignored, and the processes that they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

gc.set_threshold(20_000, 20, 20)  # tracing makes many objects, and few of them die in cycles


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_do_not_pile_up():
    """A loaded program maps memory many times over; XLA crashes where Linux allows no more."""
    yield
    if _MAPPINGS.is_file() and _MAPPINGS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Writes a tiny checkpoint and loads it, once per module: as our model, and as transformers' own."""
    from tests import tiny  # loads torch, which few modules need

    @functools.cache
    def load(shape, **layout):
        directory = tiny.write_checkpoint(tmp_path_factory.mktemp(shape), tiny.SHAPES[shape], **layout)
        return at.load(directory), tiny.load_torch(directory)

    return load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a tiny checkpoint."""
    from tests import tiny

    return tiny.write_checkpoint(tmp_path_factory.mktemp("base"), tiny.SHAPES["base"])


@pytest.fixture(scope="module")
def model(checkpoint):
    return at.load(checkpoint)


@pytest.fixture(scope="module")
def small_calls():
    """The vision tower encodes four slots at a time, so that short videos take several calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapttoken_jax.encoding._SLOTS_PER_CHUNK", 4)
        yield
