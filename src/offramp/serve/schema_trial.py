"""Compiles the JSON schema on stdin in a process of its own: `python -I schema_trial.py SYMBOLS SECONDS BYTES`.

A stranger's schema may take long to compile, take much memory, or overflow the stack, which ends a process. So `grammar`
tries each one here first. Prints what is wrong with the schema, or nothing. Here tokens are single bytes: to compile for a
model's tokens takes as long.
"""

from __future__ import annotations

import sys
import threading

STACK = 1 << 20  # bytes; threads of the server have at least twice as much


def try_schema(schema: str, symbols: int) -> None:
    """Compile, and print the error."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    limits = LLParserLimits(max_grammar_size=symbols)
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(schema), log_level=0, limits=limits)
    matcher.compute_bitmask()
    print(matcher.get_error() if matcher.is_error() else "", end="")


def main() -> None:
    symbols, seconds, size = map(int, sys.argv[1:])
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    trial = threading.Thread(target=try_schema, args=(sys.stdin.read(), symbols))
    trial.start()
    trial.join()


if __name__ == "__main__":
    main()
