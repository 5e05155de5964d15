"""The `tritrun` command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal as human_size
from rich.measure import Measurement
from rich.table import Table

from tritcore.commands import examples, new_app, with_options
from tritcore.console import err, note, out
from tritcore.errors import UsageError
from tritcore.files import check_writable, write_text_atomically
from tritcore.reference import find_model
from tritcore.repository import is_repo_id
from tritcore.versions import versions
from tritrun import listing, variants
from tritrun.aborts import end_in_one_line
from tritrun.bench import BenchRun
from tritrun.card import CardOptions, check_card, write_card
from tritrun.charts import as_svg
from tritrun.chat import Chat, ChatOptions, write_answer
from tritrun.compare import compare as run_comparison
from tritrun.compare import work_folder
from tritrun.compare_plan import Plan, SpeedSettings
from tritrun.engine import Engine
from tritrun.grammar import grammar_of_schema, read_grammar
from tritrun.loading import Loading
from tritrun.machine import physical_cores
from tritrun.models import read_projector, read_text_model
from tritrun.naming import find_labelled
from tritrun.options import (
    MODEL_HELP,
    CpuOption,
    LoadingOptions,
    ModelArgument,
    RpcOption,
    ThreadsOption,
    servers_of,
)
from tritrun.page import as_page
from tritrun.peers import DEFAULT_RECIPES
from tritrun.perplexity import Run
from tritrun.rpc_server import PORT, RpcServerOptions, serve_rpc
from tritrun.sampling import Sampling
from tritrun.serve import serve as run_serve
from tritrun.server import API_KEY, ServerOptions
from tritrun.tools import library_folder
from tritrun.vision import Question, answer_about_images

app = new_app("tritrun", "Chat with TRIT and other GGUF models, and measure them.", versions)


@app.command(
    epilog=examples(
        "tritrun chat model-TRIT3.gguf",
        "tritrun chat org/name:TRIT3",
        "tritrun chat model-TRIT3.gguf --system 'Answer in French.' --temp 0",
        "tritrun chat model-TRIT3.gguf --prompt 'What is the capital of France?'",
        "git diff | tritrun chat model-TRIT3.gguf --system 'Explain.' --prompt -",
    )
)
@with_options(LoadingOptions)
def chat(
    model: ModelArgument,
    options: LoadingOptions,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this once and leave; - reads stdin."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt; '' leaves out the model's own.")
    ] = None,
    temp: Annotated[float, typer.Option(min=0.0, metavar="T", help="Temperature; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, metavar="N", help="Draw from this many tokens; 0: from all.")] = 40,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Draw from this share of the odds.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Leave out tokens below this share of the best one.")
    ] = 0.05,
    repeat_penalty: Annotated[
        float, typer.Option(min=0.01, max=100, metavar="X", help="Divide the logits of the last 64 tokens by this.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(min=-100, max=100, metavar="X", help="Take this from the logits of the last 64 tokens.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(min=-100, max=100, metavar="X", help="Take this from them for each time that they came.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer before this text. May be repeated.")
    ] = None,
    grammar: Annotated[Path | None, typer.Option(metavar="FILE", help="Grammar of the answers, in GBNF.")] = None,
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="Answer in JSON that this schema describes.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, metavar="N", help="Gives the same answers again.", show_default="random"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Longest answer in tokens; 0 sets no limit.")] = 0,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="An image that --prompt is about. May be repeated.")
    ] = None,
) -> None:
    """Chat with a model.

    Answers are streamed to stdout, everything else goes to stderr, reasoning included, which only a terminal shows.
    /help in the chat lists its commands.
    """
    variants.force(options.cpu)
    if grammar and json_schema:
        raise UsageError("--grammar and --json-schema both say what an answer looks like: leave one of them out")
    if "" in (stop or ()):
        raise UsageError("--stop '' would end every answer: leave it out")
    if bool(image) != bool(options.mmproj) or (image and prompt is None):
        raise UsageError("a question about images needs all of --image, --mmproj and --prompt")
    file = read_text_model(find_model(model))
    loading = options.of(file)
    rules = read_grammar(grammar) if grammar else grammar_of_schema(json_schema) if json_schema else None
    sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty, grammar=rules)
    question = sys.stdin.read() if prompt == "-" else prompt
    answers = ChatOptions(sampling, seed, max_tokens, tuple(stop or ()))
    if image and options.mmproj and question is not None:
        asked = Question(question, image, system)
        answer_about_images(
            file, ServerOptions(loading, mmproj=read_projector(options.mmproj)), asked, answers, write_answer
        )
        write_answer("\n")
        return
    interactive = question is None and err.is_terminal
    if interactive:
        note(f"loading {file.path.name} ({human_size(file.size)})")
    end_in_one_line(file.path, library_folder(), loading.addresses)
    with Engine(file, loading) as engine:
        session = Chat(engine, answers, system)
        if question is not None:
            session.answer_once(question)
            return
        if interactive:
            about = f"{file.name}, {file.main_type}, {engine.n_ctx} tokens of context"
            note(f"{about}, {loading.threads} threads, {variants.in_use()}; /help lists the commands")
        if not session.run() and not sys.stdin.isatty():
            raise typer.Exit(1)


@app.command(
    epilog=examples(
        "tritrun serve model-TRIT3.gguf",
        "tritrun serve model-TRIT3.gguf --host 0.0.0.0 --api-key secret --parallel 8",
        "tritrun serve model-TRIT3.gguf -- --alias my-model --metrics",
    )
)
@with_options(LoadingOptions)
def serve(
    model: ModelArgument,
    options: LoadingOptions,
    others: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTION...", help="Any options of llama-server.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 takes a free one.")] = 8080,
    parallel: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="Users at once, each with --ctx.")] = 4,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY, metavar="KEY", help="What clients must send.", show_default="none needed"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the server's log.")] = False,
) -> None:
    """Serve a model to browsers and programs: llama.cpp's web page, and OpenAI's API for chats and embeddings.

    The address goes to stdout, everything else to stderr. Ctrl-C ends the server.
    """
    variants.force(options.cpu)
    others = others or []
    if others and not others[0].startswith("-"):
        raise UsageError(f"{others[0]} is one too many: options of llama-server come after --")
    file = read_text_model(find_model(model))
    loading = options.of(file)
    projector = read_projector(options.mmproj) if options.mmproj else None
    run_serve(file, ServerOptions(loading, host, port, parallel, api_key, projector, verbose, others))


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
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Model to give the KL divergence from.")] = None,
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
    read = read_text_model(find_model(model))
    result = run.measure(read, read_text_model(find_model(base)) if base else None, logits)
    if json == "-":
        typer.echo(result.as_json(), nl=False)
        return
    out.print(result.as_table())
    if json:
        write_text_atomically(Path(json), result.as_json())


@app.command(epilog=examples("tritrun bench model-TRIT2.gguf model-TRIT3.gguf model-Q4_K_M.gguf"))
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP, show_default=False)],
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", min=1, metavar="N", help="Length of the prompt.")
    ] = 512,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", "-n", min=1, metavar="N", help="Length of the answer.")
    ] = 64,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Runs of each test.")] = 5,
    threads: ThreadsOption = None,
    cpu: CpuOption = None,
    rpc: RpcOption = None,
) -> None:
    """Measure the speed of models, with llama.cpp's own llama-bench."""
    variants.force(cpu)
    files = [read_text_model(find_model(model)) for model in models]
    loading = Loading(servers=servers_of(rpc, files))
    layers = {file.path: loading.layers_on_gpu(file, prompt_tokens) if loading.servers else None for file in files}
    for file in files:
        loading.check_memory(file, prompt_tokens, layers[file.path] or 0)
    run = BenchRun(prompt_tokens, answer_tokens, repetitions, threads or physical_cores(), servers=loading.addresses)
    out.print(run.as_table([run.measure(file, layers[file.path]) for file in files]))


@app.command(
    epilog=examples(
        "tritrun rpc-server --host 10.0.0.2",
        "tritrun chat model-TRIT2.gguf --rpc 10.0.0.2:50052      (on another machine)",
    )
)
def rpc_server(
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="IPv4 address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port.")] = PORT,
    threads: ThreadsOption = None,
    cpu: CpuOption = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Devices to lend, such as CPU.", show_default="GPUs, else CPU"),
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Keep large tensors on the disk, for the next time.")] = False,
) -> None:
    """Lend memory and processor to a model that runs on another machine, with llama.cpp's own ggml-rpc-server.

    The address goes to stdout, everything else to stderr. Ctrl-C ends the server. It has no password and no encryption.
    """
    variants.force(cpu)
    serve_rpc(RpcServerOptions(host, port, threads or physical_cores(), device, cache))


@app.command(
    epilog=examples(
        "tritrun compare --base model-F16.gguf --text wiki.test.raw --chunks 24 model-TRIT2.gguf model-TRIT3.gguf",
        "tritrun compare --base model-F16.gguf --text wiki.test.raw --chunks 24 --html report.html "
        "--recipe default --calibrate wiki.train.raw calibrated=model-TRIT2.gguf",
        "tritrun compare --base model-F16.gguf --text wiki.test.raw --card README.md --repo org/name model-TRIT2.gguf",
    )
)
def compare(
    base: Annotated[str, typer.Option(metavar="MODEL", help="Model to compare with.", show_default=False)],
    text: Annotated[Path, typer.Option(metavar="TEXT", help="Text to predict.", show_default=False)],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL|LABEL=MODEL...", help=MODEL_HELP, show_default=False),
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
    card: Annotated[
        Path | None,
        typer.Option(metavar="README.md", help="Write a model card, and its chart beside it: docs/guide/publish.md."),
    ] = None,
    repo: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Repository that the card is for.")] = None,
    quantized_by: Annotated[str | None, typer.Option(metavar="NAME", help="Who made the files, for the card.")] = None,
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
    if (repo or quantized_by) and not card:
        raise typer.BadParameter("--repo and --quantized-by are for the card: add --card README.md")
    if repo and not is_repo_id(repo):
        raise typer.BadParameter(f"--repo {repo}: not of the form ORG/NAME")
    outputs = [path for path in (html, svg, Path(json) if json and json != "-" else None) if path]
    outputs += check_card(card, models or []) if card else []
    for path in outputs:
        check_writable(path)
    plan = Plan(
        base=find_model(base),
        text=text,
        models=[find_labelled(model) for model in models or ()],
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
    if card:
        write_card(comparison, card, CardOptions(repo, quantized_by, title or ""))


@app.command("list", epilog=examples("tritrun list", "tritrun list ~/models --json -"))
def list_models(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER...", help="Folders to look in.", show_default="the current one, and models"),
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the list as JSON; - is stdout.")] = None,
) -> None:
    """List the GGUF models in folders and in the cache of the hub: how to call them, type, size, bits per weight."""
    if json and json != "-":
        check_writable(Path(json))
    found = listing.local_models(folders or [folder for folder in (Path(), Path("models")) if folder.is_dir()])
    if json == "-":
        typer.echo(listing.as_json(found), nl=False)
        return
    _print_whole(listing.as_table(found))
    if json:
        write_text_atomically(Path(json), listing.as_json(found))


def _print_whole(table: Table) -> None:
    """Print a wide table; where there is no terminal to fit into, as wide as it is."""
    console = out
    if not out.is_terminal:
        width = Measurement.get(out, out.options.update(max_width=1000), table).maximum
        console = Console(highlight=False, emoji=False, width=max(width, out.width))
    console.print(table)
