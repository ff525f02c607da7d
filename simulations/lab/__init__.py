"""The WAN lab: real daemons on hosts of their own, joined by a router that we wrote.

Every host is a network namespace with one TUN device.  What its kernel sends comes to the router
as IP packets; the router holds each back as long as its way would take, drops some, and writes the
others to the host they are for: TCP and UDP alike, IPv4 and IPv6.

Pure: ``parts``, ``timeline`` and ``scenario`` (what a file may say), ``link`` (one direction
between two sites), ``network`` (who reaches whom, and when).  The shell: ``namespaces`` and ``tun``
(Linux, root), ``router`` (a process of its own), ``control`` (that process from outside), ``hosts``
(daemons on the hosts) and ``play`` (a scenario from beginning to end).  ``docs/lab.md`` is for its
users.
"""
