"""Commands that root runs beside a daemon: what they write there is the daemon's user's."""

import os
import pwd


def act_as_owner(folder: str) -> None:
    """Have root go on, for good, as the user whose ``folder`` is; its nearest parent counts where
    it is not there yet.

    Nothing for anybody but root, and nothing for what is root's: a state folder that the unit's
    first start has still to make, systemd gives to the unit's user with all that lies in it
    (systemd.exec(5), StateDirectory=).
    """
    if os.geteuid() != 0:
        return
    path = os.path.abspath(folder)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    owner = os.stat(path)
    if owner.st_uid == 0:
        return
    try:
        os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    except KeyError:  # a user without a name has no further groups
        os.setgroups([])
    os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
