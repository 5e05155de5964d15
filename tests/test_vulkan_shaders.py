"""The Vulkan shaders with integer dot products, on a device in software.

ggml takes them only where the device says that such products are fast, so they are run without ggml.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kernel_programs import GGML
from llamabuild.shell import BuildError, run
from llamabuild.toolchain import find_compilers
from tritcore.codec import Blocks, pack
from tritcore.format import BLOCK_SIZE, CODE_MAX, DEPTHS, N_GROUPS, N_SCALES

pytestmark = pytest.mark.build

HERE = Path(__file__).parent / "kernels/vulkan"
SOURCE = GGML / "src/ggml-vulkan/vulkan-shaders"

EXTENSION = "#extension GL_EXT_integer_dot_product : require\n"
# the product by its number in SPIR-V, as old versions of glslc do not know the extension
DOT_PRODUCT = """\
#extension GL_EXT_spirv_intrinsics : require
spirv_instruction(extensions = ["SPV_KHR_integer_dot_product"], capabilities = [6019, 6018], id = 4450)
int dot_packed(int a, int b, spirv_literal int format);
#define dotPacked4x8EXT(a, b) dot_packed(a, b, 0)
"""

VECTOR = ("FLOAT_TYPE=float", "FLOAT_TYPEV2=vec2", "ACC_TYPE=float", "USE_SUBGROUP_ADD=1")
TILE = ("FLOAT16=1", "FLOAT_TYPE=float16_t", "FLOAT_TYPEV2=f16vec2", "ACC_TYPE=float")
EXPERTS = "MUL_MAT_ID=1"
# Threads, and rows of a group of threads; of a tile, also how the threads share it: for subgroups of 8.
VECTOR_ROWS = 2
TILE_SIZE = 32
TILE_CONSTANTS = (32, TILE_SIZE, TILE_SIZE, 32, 8, 32, 1, 2, 1, 1, 8)

SHAPES = [(67, 9, 1), (5, 15, 3), (64, 1, 8), (33, 129, 1)]  # rows, blocks of a row, columns
N_EXPERTS = 4
CHOSEN = np.array([[2, 0], [3, 2], [1, 3]], np.int32)  # of each token


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs a shader; skips where there is nothing that can."""
    if not SOURCE.is_dir():
        pytest.skip(f"{SOURCE} is missing: make build")
    if shutil.which("glslc") is None:
        pytest.skip("glslc is missing (Debian: apt install glslc)")
    made = tmp_path_factory.mktemp("dispatch") / "dispatch"
    try:
        run([*find_compilers().cxx, "-std=c++17", HERE / "dispatch.cpp", "-o", made, "-lvulkan"])
    except BuildError as error:
        pytest.skip(f"{error} (Debian: apt install libvulkan-dev)")
    return made


@pytest.fixture(scope="module")
def shaders(program: Path) -> Path:
    """A copy of the shaders that any glslc compiles."""
    folder = program.parent
    copy = folder / "ggml-vulkan/vulkan-shaders"
    shutil.copytree(SOURCE, copy)
    shutil.copy2(GGML / "src/ggml-trit-common.h", folder)
    for name in ("mul_mat_vecq.comp", "mul_mmq.comp"):
        text = (copy / name).read_text(encoding="utf-8")
        assert EXTENSION in text
        (copy / name).write_text(text.replace(EXTENSION, DOT_PRODUCT), encoding="utf-8")
    return copy


class Device:
    """Compiles shaders of one depth and runs them."""

    def __init__(self, program: Path, shaders: Path, depth: int, folder: Path):
        self._program = program
        self._shaders = shaders
        self._depth = depth
        self._folder = folder

    def run(
        self,
        shader: str,
        defines: tuple[str, ...],
        groups: tuple[int, ...],
        constants: tuple[int, ...],
        push: tuple[int, ...],
        *buffers: np.ndarray,
    ) -> np.ndarray:
        """The third buffer, once the shader has run."""
        made = self._folder / "shader.spv"
        flags = [f"-D{define}" for define in (f"DATA_A_TRIT{self._depth}=1", "D_TYPE=float", *defines)]
        command = ["glslc", "-fshader-stage=compute", "--target-env=vulkan1.2", "-O", *flags]
        run([*command, self._shaders / shader, "-o", made])
        np.array(push, np.uint32).tofile(self._folder / "push")
        files = [self._folder / f"buffer{i}" for i in range(len(buffers))]
        for file, buffer in zip(files, buffers, strict=True):
            buffer.tofile(file)
        arguments = [made, *groups, ",".join(map(str, constants)), self._folder / "push", *files]
        command = [str(word) for word in (self._program, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 2:
            pytest.skip("there is no Vulkan device (Debian: apt install mesa-vulkan-drivers)")
        assert done.returncode == 0, done.stderr
        return np.fromfile(files[2], buffers[2].dtype).reshape(buffers[2].shape)


@pytest.fixture(params=DEPTHS, ids=lambda depth: f"TRIT{depth}")
def depth(request: pytest.FixtureRequest) -> int:
    """Each of them."""
    return int(request.param)


@pytest.fixture
def weights(depth: int) -> "Weights":
    """Random weights of a type."""
    return Weights(depth)


@pytest.fixture
def device(program: Path, shaders: Path, depth: int, tmp_path: Path) -> Device:
    """The device, with the shaders of that type."""
    return Device(program, shaders, depth, tmp_path)


class Weights:
    """Makes matrices of one type, and activations."""

    def __init__(self, depth: int):
        self.depth = depth
        self._random = np.random.default_rng(depth)

    def matrix(self, rows: int, n_blocks: int) -> tuple[np.ndarray, Blocks]:
        """The buffer of a matrix, and its blocks."""
        n, top = rows * n_blocks, CODE_MAX[self.depth]
        codes = self._random.integers(-top, top + 1, (n, BLOCK_SIZE)).astype(np.int8)
        blocks = Blocks(self.depth, codes, self._random.integers(0, N_SCALES, (n, N_GROUPS)).astype(np.uint8))
        packed = np.frombuffer(pack(blocks).tobytes(), np.uint8)
        return np.pad(packed, (0, -len(packed) % 4)), blocks

    def activations(self, columns: int, n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """The buffer of columns as Q8_1, four blocks together, and their float64 values (columns, weights of a row)."""
        n = 2 * columns * n_blocks
        values = self._random.integers(-127, 128, (n, 32)).astype(np.int8)
        scales = self._random.uniform(1e-3, 1, n).astype(np.float16)
        together = np.zeros((n + -n % 4) // 4, np.dtype([("ds", np.float16, (4, 2)), ("qs", np.int8, (4, 32))]))
        for i in range(n):
            together["ds"][i // 4, i % 4, 0] = scales[i]
            together["qs"][i // 4, i % 4] = values[i]
        return together, (values * scales[:, None].astype(np.float64)).reshape(columns, -1)


def check(got: np.ndarray, blocks: Blocks, y: np.ndarray, *, tile: bool) -> None:
    """Compare products with those of float64: got (columns, rows), y (columns, weights of a row)."""
    scales = blocks.group_scales()
    if tile:  # where they are halves
        scales = scales.astype(np.float16)
    exact = (scales[:, :, None].astype(np.float64) * blocks.codes.reshape(-1, N_GROUPS, 16)).reshape(got.shape[1], -1)
    assert np.all(np.abs(got - y @ exact.T) <= 1e-6 * (np.abs(y) @ np.abs(exact).T))


@pytest.mark.parametrize(("rows", "n_blocks", "columns"), SHAPES)
def test_vectors(rows: int, n_blocks: int, columns: int, weights: Weights, device: Device) -> None:
    (a, blocks), (b, y) = weights.matrix(rows, n_blocks), weights.activations(columns, n_blocks)
    k, unused = n_blocks * BLOCK_SIZE, np.zeros(4, np.float32)
    push = (k, k, k, rows, k * rows, k, rows, 0, 0, 1, 1, 1, 1)
    groups, constants = (-(-rows // VECTOR_ROWS), 1, 1), (32, VECTOR_ROWS, columns)
    d = np.zeros((columns, rows), np.float32)
    got = device.run("mul_mat_vecq.comp", VECTOR, groups, constants, push, a, b, d, unused, unused)
    check(got, blocks, y, tile=False)


@pytest.mark.parametrize(("rows", "n_blocks", "columns"), SHAPES)
def test_tiles(rows: int, n_blocks: int, columns: int, weights: Weights, device: Device) -> None:
    (a, blocks), (b, y) = weights.matrix(rows, n_blocks), weights.activations(columns, n_blocks)
    k = n_blocks * BLOCK_SIZE
    push = (rows, columns, k, k, k, rows, k * rows, k * columns, rows * columns, 0, 1, k, 1, 1, 1, 1)
    groups = (-(-rows // TILE_SIZE), -(-columns // TILE_SIZE), 1)
    d = np.zeros((columns, rows), np.float32)
    got = device.run("mul_mmq.comp", TILE, groups, TILE_CONSTANTS, push, a, b, d)
    check(got, blocks, y, tile=True)


def check_experts(got: np.ndarray, blocks: Blocks, y: np.ndarray, *, tile: bool) -> None:
    """The same for experts: got (tokens, chosen, rows), the blocks of one expert after another."""
    codes, scales = (array.reshape(N_EXPERTS, -1, array.shape[-1]) for array in (blocks.codes, blocks.scales))
    for token in range(len(got)):
        for slot, expert in enumerate(CHOSEN[token]):
            own = Blocks(blocks.depth, codes[expert], scales[expert])
            check(got[token, slot][None], own, y[token][None], tile=tile)


@pytest.mark.parametrize(("rows", "n_blocks"), [(67, 9), (5, 15)])
def test_experts_of_a_vector(rows: int, n_blocks: int, weights: Weights, device: Device) -> None:
    (a, blocks), (b, y) = weights.matrix(N_EXPERTS * rows, n_blocks), weights.activations(1, n_blocks)
    k, unused, used = n_blocks * BLOCK_SIZE, np.zeros(4, np.float32), CHOSEN.shape[1]
    push = (k, k, k, rows, k * rows, k, rows * used, 0, used, 1, 0, used)
    groups, constants = (-(-rows // VECTOR_ROWS), used, 1), (32, VECTOR_ROWS, 1)
    buffers = (a, b, np.zeros((1, used, rows), np.float32), unused, unused, CHOSEN)
    got = device.run("mul_mat_vecq.comp", (*VECTOR, EXPERTS), groups, constants, push, *buffers)
    check_experts(got, blocks, y, tile=False)


@pytest.mark.parametrize(("rows", "n_blocks"), [(67, 9), (5, 15)])
def test_experts_in_tiles(rows: int, n_blocks: int, weights: Weights, device: Device) -> None:
    tokens, used = CHOSEN.shape
    (a, blocks), (b, y) = weights.matrix(N_EXPERTS * rows, n_blocks), weights.activations(tokens, n_blocks)
    k = n_blocks * BLOCK_SIZE
    push = (rows, tokens, k, k, k, rows, k * rows, k, rows * used, used, tokens, used, 1, N_EXPERTS, 0)
    groups = (-(-rows // TILE_SIZE), 1, N_EXPERTS)
    tokens_of_each = np.bincount(CHOSEN.ravel(), minlength=N_EXPERTS).astype(np.int32)
    buffers = (a, b, np.zeros((tokens, used, rows), np.float32), CHOSEN, tokens_of_each)
    got = device.run("mul_mmq.comp", (*TILE, EXPERTS), groups, TILE_CONSTANTS, push, *buffers)
    check_experts(got, blocks, y, tile=True)
