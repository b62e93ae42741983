"""The server, driven over loopback by its clients' own packages."""
