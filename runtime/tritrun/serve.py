"""`tritrun serve`: a server for browsers and programs, until Ctrl-C."""

import http.client
import ipaddress
import sys
from contextlib import suppress

import typer

from tritcore.console import note, warning
from tritcore.gguf_header import ModelFile
from tritrun.server import ServerOptions, run_server


def serve(model: ModelFile, options: ServerOptions) -> None:
    """Serve until Ctrl-C. The address goes to stdout once the server answers. Raises as `run_server`."""
    if not options.api_key and not _is_loopback(options.host):
        warning(f"anybody who reaches {options.host} can use this server: give --api-key")

    def say_where(url: str, n_ctx: int) -> None:
        users = "one user" if options.parallel == 1 else f"{options.parallel} users at once"
        page = "" if _has_page(url) else "no web page, as this build was made without npm; "
        note(f"{page}OpenAI's API under {url}/v1, {users}, {n_ctx} tokens of context each; Ctrl-C ends it")
        typer.echo(url)  # last, as what waits for it may stop the server at once
        sys.stdout.flush()

    try:
        run_server(model, options, say_where)
    except KeyboardInterrupt:
        note("the server has ended")


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _has_page(url: str) -> bool:
    """Whether the server has a web page; other answers, and none, count as no."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/", headers={"Accept": "text/html", "Accept-Encoding": "gzip"})  # it has no other
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
