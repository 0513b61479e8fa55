"""Serve the pages of a dictionary or student (`python -m msense explore SOURCE`), or write those of words to a file."""

import atexit
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from threading import Thread
from typing import Any

from msense.errors import InputError
from msense.io import storage
from msense.io.extras import require


def export(source: str, words: Sequence[str], file: str) -> int:
    """Write the senses of words to one self-contained HTML file or URI; return 1 if no word has any.

    Raises:
        InputError: the source is invalid, or the packages of the extra are missing.
    """
    require("explore", "msense explore")
    from msense.dictionary import SenseDictionary
    from msense.explorer.render import export_words
    from msense.explorer.word import word_page

    dictionary = SenseDictionary.load(source)
    storage.write_text(file, export_words(dictionary, words))
    return 0 if any(word_page(dictionary, word, examples=0).tokens for word in words) else 1


def serve(source: str, address: tuple[str, int], **shown: Any) -> None:
    """Serve a source and what else is shown (as of `open_contents`) at a host and port until interrupted.

    A host that other machines reach asks for a token, which is printed.

    Raises:
        InputError: the source or the address is invalid, or the packages of the extra are missing.
    """
    require("explore", "msense explore")
    import uvicorn

    from msense.explorer.app import make_app
    from msense.explorer.contents import open_contents

    contents = open_contents(source, **shown)
    contents.prepare()
    host, port = address
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    app = make_app(contents, token=token, hosts=(host.lower() if token is None else "*",))
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False))
    with bound(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        page = f"http://{name}:{listener.getsockname()[1]}/"
        try:
            sys.stdout.write(page + (f"?token={token}" if token else "") + "\n")
            sys.stdout.flush()
            Thread(target=contents.prepare_rest, daemon=True).start()
            server.run(sockets=[listener])
        except BaseException as error:
            atexit.register(_exit_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
            raise


def _exit_at_once(code: int) -> None:
    """End the process while threads may still prepare pages: Python would abort in their C++ code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; port 0: a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # a browser may come before the server runs
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host} port {port}: {error}; give another --host or --port") from error
    return listener
