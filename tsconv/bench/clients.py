"""llama-server with a converted model beside llama-server dense: several clients at once.

Both serve the same file, as in tsconv.bench.compare: without our backend it is computed as a dense SwiGLU model of the
same shape and types. They answer in turn. All requests of a turn are sent at the same moment, and each client reads one
answer of a fixed length.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsconv.bench.gpu import CPU_FFN, NO_GPU, WHOLE_LAYERS, gpus_for, shares
from tsconv.commands.serve import Serving, prepare
from tsconv.errors import BackendError
from tsconv.format.header import read_header
from tsconv.machine.limits import usable_cores
from tsconv.native.devices import may_have_gpus
from tsconv.runtime.offload import NOTHING, Offload, Wanted
from tsconv.runtime.programs import AS_LLAMA, OURS, Command, program_path
from tsconv.runtime.server import answers, check_address

PROMPT_TOKENS, ANSWER_TOKENS, REPETITIONS = 8, 32, 3
VOCABULARY = 256  # token ids of the prompts are below this
START_SECONDS, STOP_SECONDS = 300, 30
HOST = "127.0.0.1"


@dataclass(frozen=True)
class ClientsRow:
    """So many clients at once. Tokens are generated ones of all clients together; figures are medians over the turns,
    ratio_min and ratio_max the spread of the ratio of two that ran one after the other.

    Attributes:
        active: mean share of the neurons that were computed to the end.
        bytes_share: bytes that FFNs and predictors read, of what dense FFNs would have read for the same batches.
    """

    model_filename: str
    n_threads: int
    n_clients: int
    avg_ts: float
    dense_avg_ts: float
    ratio: float
    ratio_min: float
    ratio_max: float
    repetitions: int
    active: float
    bytes_share: float


def measure_clients(
    path: Path,
    n_clients: Sequence[int],
    *,
    repetitions: int = REPETITIONS,
    n_threads: int | None = None,
    gpu: Wanted = NO_GPU,
    progress: Callable[[str], None] = lambda line: None,
) -> list[ClientsRow]:
    """A row for each number of clients. With a GPU llama-server dense has all attention there and as many FFNs as fit,
    or whole layers where not all attention does.

    Raises:
        ModelFileError: the model cannot be read.
        BackendError: llama-server is not installed, or does not answer.
    """
    threads = n_threads or usable_cores()
    header, there = read_header(path), gpus_for(gpu)
    return [
        _measure(path, n, repetitions, threads, shares(header, _context(n), gpu, there), progress) for n in n_clients
    ]


def _context(n_clients: int) -> int:
    return n_clients * 2 * (PROMPT_TOKENS + ANSWER_TOKENS)


def _measure(
    path: Path,
    n: int,
    repetitions: int,
    n_threads: int,
    offloads: Mapping[str, Offload],
    progress: Callable[[str], None],
) -> ClientsRow:
    options = ["--parallel", str(n), "--log-verbosity", "1", "--no-ui"]
    n_ctx = _context(n)
    with tempfile.TemporaryDirectory(prefix="tsconv-bench-") as folder:
        stats = Path(folder) / "stats.json"
        ours_there = offloads.get("tsconv", NOTHING)
        theirs_there = offloads.get(CPU_FFN, offloads.get(WHOLE_LAYERS, NOTHING))
        serving = Serving(
            os.fspath(path),
            n_ctx=n_ctx,
            n_threads=n_threads,
            on_gpus=Wanted(ours_there.n_gpu_layers, ours_there.device, vram_budget=ours_there.room),
        )
        sparse = prepare(serving, options)
        sparse.environment["TSFFN_STATS"] = os.fspath(stats)
        turns = []
        with _server(sparse) as ours, _server(_dense(path, n_ctx, n_threads, options, theirs_there)) as theirs:
            for turn in range(repetitions + 1):  # the first one touches weights and buffers
                speeds = [_tokens_per_second(port, n, turn) for port in (ours, theirs)]
                progress(f"{n} clients: tsconv {speeds[0]:.1f}, llama.cpp {speeds[1]:.1f} tokens/s")
                turns.append(speeds)
        layers: list[dict[str, int]] = json.loads(stats.read_text())["layers"]
    ratios = [mine / dense for mine, dense in turns[1:]]
    total = {key: sum(layer[key] for layer in layers) for key in layers[0]}
    return ClientsRow(
        model_filename=path.name,
        n_threads=n_threads,
        n_clients=n,
        avg_ts=statistics.median(mine for mine, _ in turns[1:]),
        dense_avg_ts=statistics.median(dense for _, dense in turns[1:]),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        repetitions=repetitions,
        active=total["active"] / total["neurons"],
        bytes_share=(total["bytes_predictor"] + total["bytes_ffn"]) / total["bytes_dense"],
    )


def _dense(path: Path, n_ctx: int, n_threads: int, options: Sequence[str], offload: Offload) -> Command:
    """Stock llama-server on the same file, told that its architecture is llama."""
    arguments = ["-m", os.fspath(path), *AS_LLAMA]
    if may_have_gpus():
        arguments += offload.arguments()
    if offload.gpus and offload.on_host:
        arguments += ["-ot", f"{offload.on_host}=CPU"]
    arguments += ["--ctx-size", str(n_ctx), "--threads", str(n_threads), *options]
    variables = {name: value for name, value in os.environ.items() if name not in OURS}
    return Command([os.fspath(program_path("llama-server")), *arguments], variables)


@contextmanager
def _server(command: Command) -> Iterator[int]:
    """The port on which the server answers while this holds."""
    port = check_address(HOST, 0)
    process = subprocess.Popen(
        [*command.arguments, "--host", HOST, "--port", str(port)],
        env=command.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"http://{HOST}:{port}"):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                assert process.stderr is not None
                said = process.stderr.read().decode(errors="replace").strip().splitlines()
                raise BackendError("llama-server did not start", found=said[-1] if said else None)
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.communicate()


def _tokens_per_second(port: int, n: int, turn: int) -> float:
    """Of `n` clients that ask at the same moment, until the last has its answer."""
    ready = threading.Barrier(n + 1)
    failures: list[BaseException] = []

    def ask(client: int) -> None:
        numbers = random.Random(1000 * turn + client)
        body = {
            "prompt": [numbers.randrange(3, VOCABULARY) for _ in range(PROMPT_TOKENS)],
            "n_predict": ANSWER_TOKENS,
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 0,
        }
        ready.wait()
        try:
            answer = _post(port, "/completion", body)
            if answer["tokens_predicted"] != ANSWER_TOKENS:
                raise BackendError("llama-server", expected=f"{ANSWER_TOKENS} tokens", found=answer["tokens_predicted"])
        except (OSError, http.client.HTTPException, ValueError, KeyError, BackendError) as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(n)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        raise BackendError("llama-server did not answer", found=failures[0])
    return n * ANSWER_TOKENS / seconds


def _post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection(HOST, port, timeout=START_SECONDS)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
