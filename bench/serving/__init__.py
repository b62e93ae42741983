"""Measuring servers from outside: real processes on loopback, and a client that keeps the time.

client.py    HTTP/1.1 over asyncio streams, one connection per request; can stop reading anywhere
answers.py   what an endpoint has said so far, streamed or not, OpenAI's or Ollama's
processes.py a server's process: its command, when it is ready, its last words
contenders.py the servers that are compared, and the folder that all of them load
load.py      closed and open loops
figures.py   what time stamps say, over several runs, as tables
plots.py     the same as PNG
jobs.py      the soak's requests
visitors.py  how the soak's clients behave: complete, leave, read slowly, ask for nonsense
leaks.py     what a server holds, sample by sample, and whether it grows
"""
