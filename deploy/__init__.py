"""How Understudy is set up: the lab on one machine, compose files, systemd units."""
