"""A process that compiles grammars of strangers, so that one which never ends, or ends the process, hurts nobody else.

Started by serve/grammar_check.py as `python -m nanodeploy.serve.grammar_worker TOKENIZER_JSON VOCAB_SIZE TIMEOUT_S
EOS_TOKEN_IDS..`. Frames on stdin and stdout: four bytes of length, little endian, and JSON. It ends when stdin does,
and by itself when a grammar takes twice the time it may.
"""

import json
import os
import resource
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import llguidance
import numpy as np

from nanodeploy.errors import ConfigError, RequestError
from nanodeploy.matcher import Grammar, Matcher, Vocabulary

STACK_BYTES = 1 << 20  # less than any thread of the engine has: what passes here does not overflow there
MEMORY_BYTES = 1 << 30  # beyond what the vocabulary takes
NUM_STEPS = 16
UNSATISFIABLE = "NoExtension"  # what llguidance says of a grammar without a sentence


def main(tokenizer_json: str, vocab_size: int, timeout_s: float, eos_token_ids: list[int]) -> None:
    """Answer until stdin ends. The first frame says whether the tokenizer can be used."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        vocabulary = Vocabulary(Path(tokenizer_json).read_text(encoding="utf-8"), vocab_size, eos_token_ids)
    except ConfigError as error:
        write(sink, {"error": str(error)})
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.stack_size(STACK_BYTES)
    write(sink, {})
    while (request := read(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
        reply: dict[str, Any] = {}
        thread = threading.Thread(target=lambda request=request, reply=reply: reply.update(tried(vocabulary, request)))
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        write(sink, reply)


def tried(vocabulary: Vocabulary, request: dict[str, Any]) -> dict[str, str]:
    """{"text": what the engine is to compile}, or {"error": why not}. `request` has text and user of a GrammarText."""
    text: str = request["text"]
    try:
        if request["user"] is not None:
            user = llguidance.grammar_from("grammar", request["user"])
            grammars = [{"name": "main", "lark_grammar": text}, {"name": "user", "lark_grammar": user}]
            text = json.dumps({"grammars": grammars}, ensure_ascii=False)
        _walk(Grammar(vocabulary, text).matcher())
    except (ValueError, RequestError) as error:
        message = str(error)
        return {"error": "no text fits it." if message.startswith(UNSATISFIABLE) else message}
    return {"text": text}


def _walk(matcher: Matcher) -> None:
    """Some grammars grow over their limits only when they are used: take a few steps, anywhere. Raises RequestError."""
    for step in range(NUM_STEPS):
        mask = np.frombuffer(matcher.mask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        if matcher.is_done:
            return
        matcher.accept(int(allowed[7919 * step % len(allowed)]))  # a prime, so as to land on all kinds


def read(source: BinaryIO) -> dict[str, Any] | None:
    """The next frame; None at the end."""
    head = source.read(4)
    return json.loads(source.read(*struct.unpack("<I", head))) if len(head) == 4 else None


def write(sink: BinaryIO, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    sink.write(struct.pack("<I", len(body)) + body)
    sink.flush()


if __name__ == "__main__":
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), list(map(int, sys.argv[4:])))
