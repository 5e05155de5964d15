"""Models on several machines: servers that are refused, and answers that are those of one process."""

import ctypes
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path

import ggml
import numpy as np
import openai
import pytest
from checkpoints import ROOT
from command_line import tritconv
from fake_rpc import OURS, FakeServer, running, sized
from gguf import GGMLQuantizationType
from started import started
from tiny_gguf import LAYERS, write_tiny_model

from slow_link import slow_link
from tritcore.codec import Blocks, pack
from tritcore.errors import TritError, UsageError
from tritcore.format import CODE_MAX
from tritcore.gguf_header import read_model_file
from tritcore.gguf_types import DEPTH_OF_TYPE
from tritrun import rpc, servers
from tritrun.loading import Loading
from tritrun.memory import share_of_layers
from tritrun.rpc import Command, Connection, Tensor
from tritrun.servers import Server, ask, explain_loss, find_servers, read_addresses

build = pytest.mark.build

GIB = 1 << 30
TYPES = sorted(DEPTH_OF_TYPE)
TRIT1, TRIT2, TRIT3, TRIT4 = (int(qtype) for qtype in TYPES)
LOST = "ggml-rpc.cpp:616: Remote RPC server crashed or returned malformed response"
HEADER = ROOT / "build/src/vendor/llama.cpp/ggml/include/ggml-rpc.h"
CLIENT = ROOT / "build/src/vendor/llama.cpp/ggml/src/ggml-rpc/ggml-rpc.cpp"


# The question whether a server can be used.


def refused(server: FakeServer, types: Sequence[GGMLQuantizationType] = TYPES) -> str:
    """Why a server cannot be used."""
    with running(server) as address, pytest.raises(TritError) as error:
        ask(address, types)
    message = str(error.value)
    assert message.startswith(f"{address} cannot be used: ")
    assert "\n" not in message
    return message.removeprefix(f"{address} cannot be used: ")


def test_a_server_of_this_build() -> None:
    server = FakeServer(devices=2, free=GIB)
    with running(server) as address:
        assert ask(address, TYPES) == Server(address, 2 * GIB)
    assert server.asked.count(Command.GRAPH_COMPUTE) == 2 * len(TYPES)


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ({}, "it does not know TRIT1"),
        ({kind: size for kind, size in OURS.items() if kind != TRIT3}, "it does not know TRIT3"),
        (OURS | {TRIT2: 42, TRIT3: 28}, "another type in the place of TRIT2, with 336 bytes for 512 weights, not 224"),
    ],
)
def test_other_types_are_refused_before_anything_is_sent(types: dict[int, int], reason: str) -> None:
    server = FakeServer(types=types)
    assert reason in refused(server, [kind for kind in TYPES if types.get(kind) != OURS[kind]])
    assert {Command.ALLOC_BUFFER, Command.SET_TENSOR, Command.GRAPH_COMPUTE}.isdisjoint(server.asked)


def test_the_same_types_in_another_format() -> None:
    assert "its products with TRIT1 differ: it has another version of the format" in refused(FakeServer(scale=1.1))
    assert "its products with TRIT1 differ" in refused(FakeServer(scale=float("nan")))


def test_a_device_without_the_kernels() -> None:
    reason = refused(FakeServer(answers={Command.GET_TENSOR: b""}))
    assert reason == "its device 0 cannot multiply by TRIT1; start it with --device CPU"


@pytest.mark.parametrize("version", [(7, 0, 1), (7, 1, 0), (6, 0, 0)])
def test_another_version_of_the_protocol(version: tuple[int, int, int]) -> None:
    assert "speaks version {}.{}.{} of llama.cpp's RPC".format(*version) in refused(FakeServer(version=version), [])


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (FakeServer(answers={Command.HELLO: b""}), "no RPC server"),
        (FakeServer(answers={Command.HELLO: b"HTTP/1.1 400 Bad Request\r\n"}), "in place of 28, as no RPC server"),
        (FakeServer(answers={Command.GET_TENSOR: struct.pack("<Q", 1 << 62)}), "4611686018427387904 bytes in place"),
        (FakeServer(answers={Command.ALLOC_BUFFER: sized(bytes(16))}), "no memory left"),
        (FakeServer(devices=0), "0 devices"),
        (FakeServer(devices=4_000_000_000), "4000000000 devices"),
    ],
)
def test_hostile_and_strange_servers(server: FakeServer, reason: str) -> None:
    assert reason in refused(server)


def test_a_model_without_trit_types_needs_no_trit_types(tiny_model: Path) -> None:
    with running(FakeServer(types={})) as address:
        assert find_servers([address], [read_model_file(tiny_model)]) == (Server(address, GIB),)


def test_a_busy_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_SECONDS", 0.2)
    with (
        running(FakeServer()) as address,
        Connection("127.0.0.1", int(address.partition(":")[2]), 1),
        pytest.raises(TritError, match=r"does not answer within 0\.2 seconds: it has one client at a time"),
    ):
        ask(address)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_no_server() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        TritError, match=f"^{address} cannot be reached: Connection refused; start `tritrun rpc-server`"
    ):
        ask(address)
    with pytest.raises(TritError, match=r"^no-such-host\.invalid:1 cannot be reached: "):
        ask("no-such-host.invalid:1")


def test_addresses() -> None:
    assert read_addresses("10.0.0.2:50052, laptop:1") == ("10.0.0.2:50052", "laptop:1")


@pytest.mark.parametrize(
    "text", ["", "laptop", "laptop:", ":1", "a:1,", "a:0", "a:65536", "[::1]:5", "a:1,a:1", "a b:1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=f"^--rpc {re.escape(text)}: "):
        read_addresses(text)


def test_too_many_addresses() -> None:
    with pytest.raises(UsageError, match="more than 16 servers"):
        read_addresses(",".join(f"a:{port}" for port in range(1, 18)))


def test_a_loss_names_the_server_that_is_gone() -> None:
    with running(FakeServer()) as there:
        gone = f"127.0.0.1:{free_port()}"
        explained = explain_loss(LOST, [there, gone])
        assert explained == f"{gone} has ended, or closed the connection ({LOST}); start it again, and then this"
        assert str(explain_loss(LOST, [there])).startswith(f"{there} has ended, or closed")
        assert explain_loss("ggml.c:1: another check", [there]) is None
    assert explain_loss(LOST, []) is None


# Layers.


def test_layers_are_shared_by_memory(tiny_model: Path) -> None:
    model = read_model_file(tiny_model)
    shares = [share_of_layers(model, *memory) for memory in ((0, GIB), (GIB, GIB), (GIB, 0), (GIB, None), (0, 0))]
    assert shares == [0, 2, LAYERS + 1, 2, 0]


@build
def test_layers_for_servers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritrun.loading.available_memory", lambda: 2 * GIB)
    model = read_model_file(tiny_model)

    def layers(free: int, wanted: str = "auto") -> int:
        return Loading(gpu_layers=wanted, servers=(Server("a:1", free),)).layers_on_gpu(model, 64)

    assert [layers(0), layers(2 * GIB), layers(100 * GIB), layers(0, "all")] == [0, 2, LAYERS + 1, LAYERS + 1]
    small = Loading(servers=(Server("a:1", 1000), Server("b:1", 1000)))
    with pytest.raises(TritError, match=r"does not fit into the memory of a:1, b:1: it needs .*, 2\.0 kB are free"):
        small.check_memory(model, 64, LAYERS + 1)
    small.check_memory(model, 64, 0)


# What Python knows of the C code.


@build
def test_the_protocol_is_that_of_the_source() -> None:
    numbers = re.findall(r"define RPC_PROTO_(?:MAJOR|MINOR|PATCH)_VERSION +(\d+)", HEADER.read_text())
    assert tuple(map(int, numbers)) == rpc.VERSION
    (listed,) = re.findall(r"enum rpc_cmd \{(.*?)\};", CLIENT.read_text(), re.DOTALL)
    in_order = re.findall(r"RPC_CMD_(\w+)", listed)
    assert {name: in_order.index(name) for name in Command.__members__} == dict(Command.__members__)
    library = ggml.base()
    library.ggml_op_name.restype = ctypes.c_char_p
    assert library.ggml_op_name(rpc.OP_MUL_MAT) == b"MUL_MAT"


# Servers.


def tritrun(*arguments: object, exit_code: int = 0, before: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    command = [*before, sys.executable, "-m", "tritrun", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == exit_code, done.stderr
    return done


def refusal(*arguments: object) -> str:
    """The only line of a command that fails, without "error: "."""
    done = tritrun(*arguments, exit_code=1)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip("\n")


def lending(
    *options: object, before: Sequence[str] = ()
) -> "AbstractContextManager[tuple[str, subprocess.Popen[str]]]":
    """A server, and its address."""
    command = [*before, sys.executable, "-m", "tritrun", "rpc-server", "--threads", "1", *map(str, options)]
    if "--port" not in options:
        command += ["--port", str(free_port())]
    return started(command)


@pytest.fixture(scope="module")
def two_servers() -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(lending())[0] for _ in range(2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Tiny models in TRIT2 and TRIT3, by the length of their rows: those of SmolLM2 and Qwen2.5-0.5B."""
    folder = tmp_path_factory.mktemp("remote")
    made = {}
    for hidden, depth in ((576, 2), (896, 3)):
        plain = write_tiny_model(folder / f"{hidden}.gguf", hidden=hidden)
        made[hidden] = folder / f"{hidden}-TRIT{depth}.gguf"
        done = tritconv("gguf-to-gguf", plain, "--fast", "--depth", depth, "-o", made[hidden])
        assert done.returncode == 0, done.stderr
    return made


def answer(model: Path, *options: object, before: Sequence[str] = ()) -> str:
    chat = ("chat", model, "--prompt", "hello", "--temp", 0, "--max-tokens", 24, "--threads", 1)
    done = tritrun(*chat, *options, before=before)
    assert done.stderr == ""
    assert len(done.stdout) > 20
    return done.stdout


@build
@pytest.mark.parametrize("hidden", [576, 896])
def test_servers_answer_as_one_process_does(models: dict[int, Path], two_servers: list[str], hidden: int) -> None:
    alone = answer(models[hidden])
    both = ",".join(two_servers)
    for where in ((two_servers[0], "all"), (both, "all"), (both, "1"), (both, "auto")):
        assert answer(models[hidden], "--rpc", where[0], "--gpu-layers", where[1]) == alone


@build
def test_a_slow_link(models: dict[int, Path], two_servers: list[str]) -> None:
    alone = answer(models[576])
    with slow_link(two_servers[0], delay=0.005, bytes_per_second=4e6) as link:
        assert answer(models[576], "--rpc", f"{link},{two_servers[1]}", "--gpu-layers", "all") == alone


@contextmanager
def serving(model: Path, *options: object) -> Iterator[tuple[openai.OpenAI, "subprocess.Popen[str]"]]:
    """`tritrun serve`, and a client of it."""
    command = [sys.executable, "-m", "tritrun", "serve", model, "--port", 0, "--ctx", 512, "--threads", 1, *options]
    with (
        started(command) as (url, process),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client, process


@build
def test_serve_with_servers(models: dict[int, Path], two_servers: list[str]) -> None:
    def answered(*options: object) -> str:
        with serving(models[576], *options) as (client, _):
            return client.completions.create(model="any", prompt="hello", temperature=0, max_tokens=24).choices[0].text

    alone = answered()
    assert len(alone) > 20
    assert answered("--rpc", ",".join(two_servers), "--gpu-layers", "all") == alone


@build
def test_bench_with_servers(models: dict[int, Path], two_servers: list[str]) -> None:
    table = tritrun("bench", models[576], "--rpc", two_servers[0], "-p", 8, "-n", 4, "-r", 1, "-t", 1).stdout
    assert f"with {two_servers[0]}" in " ".join(table.split())


@build
@pytest.mark.parametrize("command", [["chat", "--prompt", "hello"], ["serve", "--port", "0"], ["bench"]])
def test_a_server_of_another_build_is_refused_by_name(models: dict[int, Path], command: list[str]) -> None:
    """As a stock server does it: it closes the connection when it sees the number of a type that it does not know."""
    server = FakeServer(types={})
    with running(server) as address:
        line = refusal(command[0], models[576], *command[1:], "--rpc", address)
    assert line.startswith(f"{address} cannot be used: it does not know TRIT2; install trit-gguf ")
    assert Command.SET_TENSOR not in server.asked


@build
def test_a_server_outlives_strange_clients(two_servers: list[str]) -> None:
    host, _, port = two_servers[0].partition(":")
    tensor = Tensor(1, TYPES[0], (64, 1)).pack()
    with Connection(host, int(port), 20) as connection:
        connection.hello()
        with pytest.raises(rpc.Closed):  # a client of a later llama.cpp, with a type that this one does not know
            connection._ask(Command.INIT_TENSOR, tensor[:8] + struct.pack("<I", 200) + tensor[12:], "<Q")
    values = Tensor(1, GGMLQuantizationType.F32, (1 << 20, 4))
    for _ in range(3):
        with Connection(host, int(port), 20) as connection:  # leaves while it is answered
            connection.hello()
            buffer, base = connection.alloc_buffer(0, values.n_bytes)
            wanted = Tensor(1, values.type, values.shape, buffer, base)
            connection._send(Command.GET_TENSOR, wanted.pack() + struct.pack("<QQ", 0, wanted.n_bytes))
            connection._receive(1)
    assert ask(two_servers[0], TYPES).free > 0


GET_ROWS = 40  # GGML_OP_GET_ROWS
F32, I32 = GGMLQuantizationType.F32, GGMLQuantizationType.I32


@build
@pytest.mark.parametrize("rows", [32, 24])  # a whole number of strips of 16, and not
@pytest.mark.parametrize("qtype", TYPES)
def test_a_server_has_the_rows_of_a_matrix_as_they_came(
    two_servers: list[str], qtype: GGMLQuantizationType, rows: int
) -> None:
    depth = DEPTH_OF_TYPE[qtype]
    rng = np.random.default_rng(rows)
    codes = rng.integers(-CODE_MAX[depth], CODE_MAX[depth] + 1, (2 * rows, 64), dtype=np.int8)
    blocks = Blocks(depth, codes, rng.integers(9, 18, (2 * rows, 4), dtype=np.uint8))
    data, weights = pack(blocks).tobytes(), blocks.decode().reshape(rows, 128)
    host, _, port = two_servers[0].partition(":")
    with Connection(host, int(port), 20) as server:
        server.hello()
        buffer, base = server.alloc_buffer(0, 1 << 20)
        places = iter(range(base, base + (1 << 20), 1 << 16))
        matrix = Tensor(1, qtype, (128, rows), buffer, next(places))
        columns = Tensor(2, F32, (128, 4), buffer, next(places))
        product = Tensor(3, F32, (rows, 4), buffer, next(places), rpc.OP_MUL_MAT, (1, 2))
        numbers = Tensor(4, I32, (3, 1), buffer, next(places))
        picked = Tensor(5, F32, (128, 3), buffer, next(places), GET_ROWS, (1, 4))
        server.write(columns, np.eye(128, dtype="<f4")[[0, 1, 64, 127]].tobytes())
        server.write(numbers, np.array([0, 17, rows - 1], "<i4").tobytes())

        def multiply() -> bytes:
            server.compute(0, product, (matrix, columns))
            return server.read(product)

        server.write(matrix, data)
        first = multiply()
        result = np.frombuffer(first, "<f4").reshape(4, rows).T
        assert np.abs(result - weights[:, [0, 1, 64, 127]]).max() < 0.01 * np.abs(weights).max()
        assert multiply() == first
        assert server.read(matrix) == data
        assert multiply() == first
        server.compute(0, picked, (matrix, numbers))
        assert (np.frombuffer(server.read(picked), "<f4").reshape(3, 128) == weights[[0, 17, rows - 1]]).all()
        assert multiply() == first
        server.write(matrix, pack(blocks).tobytes())
        assert multiply() == first


@contextmanager
def long_answer(model: Path, address: str, before: Sequence[str] = ()) -> Iterator["subprocess.Popen[str]"]:
    """A chat whose layers are all on a server, in the middle of an endless answer."""
    options = ("--prompt", "hello", "--temp", "0", "--ctx", "32768", "--rpc", address, "--gpu-layers", "all")
    command = [*before, sys.executable, "-m", "tritrun", "chat", str(model), *options]
    with started(command, n_characters=1) as (_, process):
        yield process


@build
def test_a_server_that_dies_in_the_middle_gives_one_line(models: dict[int, Path]) -> None:
    with lending() as (address, server), long_answer(models[576], address) as chat:
        server.kill()
        _, stderr = chat.communicate(timeout=60)
    assert chat.returncode == 1
    assert stderr.startswith(f"error: {address} has ended, or closed the connection (")
    assert stderr.endswith("; start it again, and then this\n")
    assert stderr.count("\n") == 1


@build
def test_serve_ends_with_its_server(models: dict[int, Path]) -> None:
    with (
        lending() as (address, server),
        serving(models[576], "--rpc", address, "--gpu-layers", "all") as (client, process),
    ):
        server.kill()
        server.wait()
        with pytest.raises(openai.OpenAIError):
            client.completions.create(model="any", prompt="hello", max_tokens=8)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f"error: {address} has ended, or closed the connection (" in stderr.splitlines()[-1]


# tritrun rpc-server.


@build
def test_what_a_server_says() -> None:
    with lending("--host", "0.0.0.0") as (address, process):
        assert address.startswith("0.0.0.0:")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    warning, lends, end = stderr.splitlines()
    assert warning.startswith(f"warning: anybody who reaches {address} can use this server")
    assert re.fullmatch(r"lends up to [\d.]+ [GTM]B of memory, to one client at a time; Ctrl-C ends it", lends)
    assert end == "the server has ended"


@build
def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("rpc-server", "--port", port)
    assert line == f"127.0.0.1:{port} cannot be listened on: is it in use? Choose another --port"


@build
def test_devices_that_are_not_there() -> None:
    assert "unknown device: Abacus" in refusal("rpc-server", "--port", free_port(), "--device", "Abacus")


@build
def test_a_host_that_is_no_address() -> None:
    assert (
        "--host ::1: ggml-rpc-server takes IPv4 addresses only"
        in tritrun("rpc-server", "--host", "::1", exit_code=2).stderr
    )


# Two machines, as far as one can be two.

_numbers = count()


@pytest.fixture
def two_machines() -> Iterator[tuple[list[str], list[str], str, str]]:
    """Two network namespaces with a cable.

    Yields:
        The commands that enter them, the address of the first one, and the name of the second.
    """
    if os.name != "posix" or shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0:
        pytest.skip("needs root, and the programs ip and tc of iproute2")
    number = next(_numbers)
    one, two = (f"trit-{os.getpid()}-{number}-{side}" for side in "ab")
    net = f"10.213.{os.getpid() % 256}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", one)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", two)
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
        for side, host in ((one, 1), (two, 2)):
            ip("-n", side, "address", "add", f"{net}.{host}/24", "dev", "cable")
            ip("-n", side, "link", "set", "cable", "up")
            ip("-n", side, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", one], ["ip", "netns", "exec", two], f"{net}.1", two
    finally:
        for side in (one, two):
            subprocess.run(["ip", "netns", "delete", side], check=False, capture_output=True)


@build
def test_two_machines_with_a_slow_network(
    models: dict[int, Path], two_machines: tuple[list[str], list[str], str, str]
) -> None:
    one, two, host, _ = two_machines
    for side in (one, two):
        limit = "tc qdisc add dev cable root tbf rate 20mbit burst 64kb latency 1s"
        subprocess.run([*side, *limit.split()], check=True)
    with lending("--host", host, before=one) as (address, _):
        options = ("--rpc", address, "--gpu-layers", "all")
        assert answer(models[896], *options, before=two) == answer(models[896])


@build
@pytest.mark.slow
def test_a_machine_that_loses_its_network(
    models: dict[int, Path], two_machines: tuple[list[str], list[str], str, str]
) -> None:
    one, two, host, name = two_machines
    with lending("--host", host, before=one) as (address, server), long_answer(models[576], address, two) as chat:
        (program,) = map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())
        start = time.monotonic()
        # The client waits for an answer then, and has sent nothing that the other end's system has not confirmed.
        os.kill(program, signal.SIGSTOP)
        time.sleep(1)
        subprocess.run(["ip", "-n", name, "link", "set", "cable", "down"], check=True)
        _, stderr = chat.communicate(timeout=120)
        os.kill(program, signal.SIGCONT)
        assert stderr.startswith(f"error: {address} has ended, or closed the connection (")
        assert stderr.count("\n") == 1
        assert time.monotonic() - start < 60
        # The server is free for others again, though nobody has told it that its client is gone.
        free = "import sys; from tritrun.servers import ask; ask(sys.argv[1])"
        assert subprocess.run([*one, sys.executable, "-c", free, address], check=False).returncode == 0
        assert server.poll() is None
