"""The `tritrun` command line."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal as human_size

from tritconv.commands import examples, new_app
from tritconv.console import err, forgive_encodings, note, out
from tritconv.model_file import read_model_file
from tritrun import variants
from tritrun.bench import BenchRun
from tritrun.chat import Chat, ChatOptions
from tritrun.engine import Engine
from tritrun.files import write_text_atomically
from tritrun.machine import available_memory, physical_cores
from tritrun.perplexity import Run


def _versions() -> str:
    return f"{_version('trit-gguf')} (llama-cpp-python {_version('llama-cpp-python')})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


app = new_app("tritrun", "Chat with TRIT and other GGUF models, and measure them.", _versions)

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="Model file.", show_default=False)]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, metavar="N", help="CPU threads.", show_default="physical cores"),
]
CpuOption = Annotated[
    str | None,
    typer.Option("--cpu", metavar="VARIANT", help="CPU code to use, such as haswell.", show_default="the best"),
]


@app.command(
    epilog=examples(
        "tritrun chat model-TRIT3.gguf",
        "tritrun chat model-TRIT3.gguf --system 'Answer in French.' --temp 0",
        "tritrun chat model-TRIT3.gguf --prompt 'What is the capital of France?'",
        "git diff | tritrun chat model-TRIT3.gguf --system 'Explain.' --prompt -",
    )
)
def chat(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this once and leave; - reads stdin."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt; '' leaves out the model's own.")
    ] = None,
    temp: Annotated[float, typer.Option(min=0.0, metavar="T", help="Temperature; 0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Draw from this share of the odds.")
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, metavar="N", help="Gives the same answers again.", show_default="random"),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**24,
            metavar="N",
            help="Context in tokens; 0: the model's.",
            show_default="up to 4096",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Longest answer in tokens; 0 sets no limit.")] = 0,
    threads: ThreadsOption = None,
    cpu: CpuOption = None,
    gpu_layers: Annotated[int, typer.Option(min=-1, metavar="N", help="Layers to keep on a GPU; -1 is all.")] = 0,
) -> None:
    """Chat with a model.

    Answers are streamed to stdout, everything else goes to stderr. /help in the chat lists its commands.
    """
    forgive_encodings()
    variants.force(cpu)
    file = read_model_file(model)
    threads = threads or physical_cores()
    question = sys.stdin.read() if prompt == "-" else prompt
    interactive = question is None and err.is_terminal
    if interactive:
        note(f"loading {file.path.name} ({human_size(file.size)})")
    with Engine(file, n_ctx=ctx, threads=threads, gpu_layers=gpu_layers) as engine:
        session = Chat(engine, ChatOptions(temp, top_p, seed, max_tokens), system)
        if question is not None:
            session.answer_once(question)
            return
        if interactive:
            about = f"{file.name}, {file.main_type}, {engine.n_ctx} tokens of context"
            note(f"{about}, {threads} threads, {variants.in_use()}; /help lists the commands")
        session.run()


@app.command(
    epilog=examples(
        "tritrun perplexity model-TRIT3.gguf --file wiki.test.raw",
        "tritrun perplexity model-TRIT3.gguf --file wiki.test.raw --base model-F16.gguf --chunks 24",
        "tritrun perplexity model-TRIT3.gguf --file wiki.test.raw --base model-F16.gguf --json -",
    )
)
def perplexity(
    model: ModelArgument,
    file: Annotated[Path, typer.Option("--file", "-f", metavar="TEXT", help="Text to predict.", show_default=False)],
    base: Annotated[Path | None, typer.Option(metavar="F16.gguf", help="Model to give the KL divergence from.")] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Chunks of text to use.", show_default="all")
    ] = None,
    ctx: Annotated[
        int, typer.Option(min=16, max=2**24, metavar="N", help="Tokens per chunk; its second half counts.")
    ] = 512,
    threads: ThreadsOption = None,
    cpu: CpuOption = None,
    logits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the base's logits here, and use them again.")
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the figures as JSON; - is stdout.")] = None,
) -> None:
    """Measure how well a model predicts a text, with llama.cpp's own llama-perplexity."""
    variants.force(cpu)
    run = Run(file, ctx, chunks, threads or physical_cores())
    result = run.measure(read_model_file(model), read_model_file(base) if base else None, logits)
    if json == "-":
        typer.echo(result.as_json(), nl=False)
        return
    out.print(result.as_table())
    if json:
        write_text_atomically(Path(json), result.as_json())


@app.command(epilog=examples("tritrun bench model-TRIT2.gguf model-TRIT3.gguf model-Q4_K_M.gguf"))
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL.gguf...", help="Model files.", show_default=False)],
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", min=1, metavar="N", help="Length of the prompt.")
    ] = 512,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", "-n", min=1, metavar="N", help="Length of the answer.")
    ] = 64,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Runs of each test.")] = 5,
    threads: ThreadsOption = None,
    cpu: CpuOption = None,
) -> None:
    """Measure the speed of models, with llama.cpp's own llama-bench."""
    variants.force(cpu)
    files = [read_model_file(model) for model in models]
    for file in files:
        file.check_memory(prompt_tokens, available_memory())
    run = BenchRun(prompt_tokens, answer_tokens, repetitions, threads or physical_cores())
    out.print(run.as_table([run.measure(file) for file in files]))
