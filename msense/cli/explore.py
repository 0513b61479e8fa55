"""Serve the pages of a dictionary or student (`python -m msense explore SOURCE`)."""

import ipaddress
import secrets
import socket
import sys
from threading import Thread

from msense.errors import InputError
from msense.io.extras import require


def explore(source: str, compare: str | None, host: str, port: int) -> None:
    """Serve until interrupted; a host that other machines reach asks for a token, which is printed.

    Raises:
        InputError: the source or the address is invalid, or the packages of the extra are missing.
    """
    require("explore", "msense explore")
    import uvicorn

    from msense.explorer.app import make_app
    from msense.explorer.contents import open_contents

    contents = open_contents(source, compare)
    contents.prepare()
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    app = make_app(contents, token=token, hosts=() if token is None else ("*",))
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False))
    with _bound(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        sys.stdout.write(address + (f"?token={token}" if token else "") + "\n")
        sys.stdout.flush()
        Thread(target=contents.prepare_rest, daemon=True).start()
        server.run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
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
