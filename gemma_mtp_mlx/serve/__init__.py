"""The server: HTTP in, requests of one running batch out. Needs the extra `serve`."""
