"""HTTPS, if the flags ask for it."""

import ssl

from nibble.config.server_args import ServerArgs
from nibble.utils.errors import ConfigError


def tls_context(args: ServerArgs) -> ssl.SSLContext | None:
    """The server's side of TLS 1.2 and newer; None serves plain HTTP.

    Raises ConfigError for files that can't be used, and for flags without the certificate that they belong to.
    """
    if args.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_keyfile_password"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --ssl-certfile; without it the server speaks HTTP")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty password fails where none was given and one is needed, instead of asking a terminal for it.
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, lambda: args.ssl_keyfile_password or "")
        if args.ssl_ca_certs is not None:
            context.load_verify_locations(args.ssl_ca_certs)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"HTTPS can't be served with --ssl-certfile {args.ssl_certfile}, --ssl-keyfile {args.ssl_keyfile}"
            f" and --ssl-ca-certs {args.ssl_ca_certs}: {error}"
        ) from error
    return context
