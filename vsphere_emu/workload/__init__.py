"""What guests do with their disks: a web server's files, file churn, a database.

A workload is a process of its own (``python -m vsphere_emu.workload``) that runs until SIGTERM.
"""
