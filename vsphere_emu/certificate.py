"""The emulated vCenter's own certificate, made once: a CA of its own and what that signed.

The CA's key is thrown away: nothing else can ever be signed by it.
"""

import datetime as dt
import os

from daemon.certificates import SERVER, Issuer, certificate_pem, key_pem, new_key, subject
from daemon.durable import make_folder, write_whole
from vsphere_emu.config import Tls

LIFETIME = dt.timedelta(days=3650)
CA_FILE = "ca.pem"


def own_certificate(folder: str, name: str, host: str) -> Tls:
    """Certificate and key in ``folder``, made if they are not there; ``ca.pem`` is beside them."""
    files = Tls(
        certificate=os.path.join(folder, "certificate.pem"), key=os.path.join(folder, "key.pem")
    )
    if os.path.exists(files.certificate):
        return files
    make_folder(folder)
    issuer = Issuer.create(f"{name} CA"[:64], LIFETIME)
    key = new_key()
    names = tuple(dict.fromkeys((host, "127.0.0.1", "localhost")))
    certificate = issuer.issue(
        subject(name), key.public_key(), usages=[SERVER], lifetime=LIFETIME, names=names
    )
    write_whole(files.key, key_pem(key))
    write_whole(os.path.join(folder, CA_FILE), certificate_pem(issuer.certificate), mode=0o644)
    # Last: when it is there, all of it is.
    write_whole(files.certificate, certificate_pem(certificate), mode=0o644)
    return files
