"""The `tritrun` command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal as human_size
from rich.measure import Measurement
from rich.table import Table

from tritcore.commands import examples, new_app
from tritcore.console import err, note, out
from tritcore.files import check_writable, write_text_atomically
from tritcore.versions import versions
from tritrun import variants
from tritrun.aborts import end_in_one_line
from tritrun.bench import BenchRun
from tritrun.charts import as_svg
from tritrun.chat import Chat, ChatOptions
from tritrun.compare import compare as run_comparison
from tritrun.compare import work_folder
from tritrun.compare_plan import Plan, SpeedSettings
from tritrun.engine import Engine
from tritrun.machine import available_memory, physical_cores
from tritrun.memory import check_memory
from tritrun.models import read_text_model
from tritrun.page import as_page
from tritrun.peers import DEFAULT_RECIPES
from tritrun.perplexity import Run
from tritrun.tools import library_folder

app = new_app("tritrun", "Chat with TRIT and other GGUF models, and measure them.", versions)

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
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="See first that no weight and no block is damaged.")
    ] = True,
) -> None:
    """Chat with a model.

    Answers are streamed to stdout, everything else goes to stderr, reasoning included, which only a terminal shows.
    /help in the chat lists its commands.
    """
    variants.force(cpu)
    file = read_text_model(model)
    threads = threads or physical_cores()
    question = sys.stdin.read() if prompt == "-" else prompt
    interactive = question is None and err.is_terminal
    if interactive:
        note(f"loading {file.path.name} ({human_size(file.size)})")
    end_in_one_line(file.path, library_folder())
    with Engine(file, n_ctx=ctx, threads=threads, gpu_layers=gpu_layers, check=check) as engine:
        session = Chat(engine, ChatOptions(temp, top_p, seed, max_tokens), system)
        if question is not None:
            session.answer_once(question)
            return
        if interactive:
            about = f"{file.name}, {file.main_type}, {engine.n_ctx} tokens of context"
            note(f"{about}, {threads} threads, {variants.in_use()}; /help lists the commands")
        if not session.run() and not sys.stdin.isatty():
            raise typer.Exit(1)


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
    if json and json != "-":
        check_writable(Path(json))
    run = Run(file, ctx, chunks, threads or physical_cores())
    result = run.measure(read_text_model(model), read_text_model(base) if base else None, logits)
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
    files = [read_text_model(model) for model in models]
    for file in files:
        check_memory(file, prompt_tokens, available_memory())
    run = BenchRun(prompt_tokens, answer_tokens, repetitions, threads or physical_cores())
    out.print(run.as_table([run.measure(file) for file in files]))


@app.command(
    epilog=examples(
        "tritrun compare --base model-F16.gguf --text wiki.test.raw --chunks 24 model-TRIT2.gguf model-TRIT3.gguf",
        "tritrun compare --base model-F16.gguf --text wiki.test.raw --chunks 24 --html report.html "
        "--recipe default --calibrate wiki.train.raw calibrated=model-TRIT2.gguf",
    )
)
def compare(
    base: Annotated[Path, typer.Option(metavar="F16.gguf", help="Model to compare with.", show_default=False)],
    text: Annotated[Path, typer.Option(metavar="TEXT", help="Text to predict.", show_default=False)],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL.gguf|LABEL=MODEL.gguf...", help="Model files.", show_default=False),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Make these of the base with llama-quantize, and compare them too; 'default' stands for "
            f"{','.join(DEFAULT_RECIPES)}. May be repeated.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Make an importance matrix for the recipes on this text.")
    ] = None,
    calibrate_chunks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Chunks of that text to use.", show_default="all")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix for the recipes, if there is one already.")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Chunks of text to use.", show_default="all")
    ] = None,
    ctx: Annotated[
        int, typer.Option(min=16, max=2**24, metavar="N", help="Tokens per chunk; its second half counts.")
    ] = 512,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed too.")] = True,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds of measuring speed, over all files.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Length of the prompt, for speed.")] = 512,
    answer_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Length of the answer, for speed.")] = 64,
    threads: ThreadsOption = None,
    cpu: CpuOption = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep what takes long here, and use it again: recipes, logits, figures.",
            show_default="beside the first output file, else nothing is kept",
        ),
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the figures as JSON; - is stdout.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with charts.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the chart of divergence and size.")] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Title of the report.", show_default="the base's name")
    ] = None,
) -> None:
    """Compare files of one model with their base: size, perplexity, KL divergence, speed."""
    variants.force(cpu)
    recipes = [name.strip() for names in recipe or () for name in names.split(",") if name.strip()]
    recipes = [peer for name in recipes for peer in (DEFAULT_RECIPES if name == "default" else (name,))]
    if not models and not recipes:
        raise typer.BadParameter("nothing to compare with the base: name a model, or use --recipe")
    if (calibrate or imatrix) and not recipes:
        raise typer.BadParameter("--calibrate and --imatrix are for the files of --recipe, and there is none")
    if calibrate and imatrix:
        raise typer.BadParameter("--calibrate makes an importance matrix, --imatrix brings one: give only one")
    outputs = [path for path in (html, svg, Path(json) if json and json != "-" else None) if path]
    for path in outputs:
        check_writable(path)
    plan = Plan(
        base=base,
        text=text,
        models=models or [],
        recipes=list(dict.fromkeys(recipes)),
        chunks=chunks,
        ctx=ctx,
        threads=threads or physical_cores(),
        calibrate=calibrate,
        calibrate_chunks=calibrate_chunks,
        imatrix=imatrix,
        speed=SpeedSettings(rounds, prompt_tokens, answer_tokens) if speed else None,
        title=title or "",
    )
    with work_folder(work, outputs) as folder:
        comparison = run_comparison(plan, folder)
    if json == "-":
        typer.echo(comparison.as_json(), nl=False)
    else:
        _print_whole(comparison.as_table())
    if json and json != "-":
        write_text_atomically(Path(json), comparison.as_json())
    if html:
        write_text_atomically(html, as_page(comparison))
    if svg:
        write_text_atomically(svg, as_svg(comparison))


def _print_whole(table: Table) -> None:
    """Print a wide table; where there is no terminal to fit into, as wide as it is."""
    console = out
    if not out.is_terminal:
        width = Measurement.get(out, out.options.update(max_width=1000), table).maximum
        console = Console(highlight=False, emoji=False, width=max(width, out.width))
    console.print(table)
