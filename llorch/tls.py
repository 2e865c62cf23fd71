"""TLS contexts, for the side that listens and the side that calls."""

from __future__ import annotations

import ssl

from llorch.errors import ConfigError


def server_context(cert_file: str, key_file: str) -> ssl.SSLContext:
    """For a listener. Raises ConfigError when the files can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # The pass phrase of an encrypted key would be asked for on the terminal, which a service does not have.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except OSError as error:
        reason = _reason(error, "not a matching, unencrypted PEM pair")
        raise ConfigError(f"the certificate {cert_file} with key {key_file} can't be used: {reason}") from None
    return context


def _reason(error: OSError, if_tls: str) -> str:
    """An SSLError is an OSError whose words are OpenSSL's own; a file that can't be read has the system's."""
    return if_tls if isinstance(error, ssl.SSLError) else error.strerror or type(error).__name__


def client_context(ca_file: str | None) -> ssl.SSLContext:
    """For calls: the system's authorities, and `ca_file` if one is given."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            reason = _reason(error, "no PEM certificate in it")
            raise ConfigError(f"the authority file {ca_file} can't be used: {reason}") from None
    return context
