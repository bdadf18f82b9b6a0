"""The lab: every part of Understudy on one machine, on real disks, and the proof that it works."""
