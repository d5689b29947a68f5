#!/usr/bin/env python3
"""Makes a small code-completion data set of the standard library of the Python that runs this.

Each function with a docstring becomes one example: the prompt is its signature and docstring, the
completion is its body. Writes OUT/train.jsonl and OUT/eval.jsonl, split by a hash of the function, so
that an example is on the same side whatever the limits are. The same Python gives the same files.
"""
import argparse
import ast
import hashlib
import json
import os
import pathlib
import sys
import sysconfig
import textwrap
import warnings

MIN_LINES, MAX_LINES = 2, 60
MAX_PROMPT_LINES = 60
EVAL_SHARE = 0.1
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3",
                   "turtledemo", "__pycache__", "ensurepip"}


def source_files():
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def functions(path):
    """Yields (prompt, completion) of the functions with docstrings in one file."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        docstring = node.body[0]
        if ast.get_docstring(node) is None or docstring.end_lineno >= node.body[1].lineno:
            continue
        prompt = textwrap.dedent("".join(lines[node.lineno - 1:docstring.end_lineno]))
        whole = textwrap.dedent("".join(lines[node.lineno - 1:node.end_lineno]))
        if not whole.startswith(prompt):  # a docstring that leans out to the left
            continue
        yield prompt, whole[len(prompt):].rstrip("\n") + "\n"


def examples():
    seen = set()
    for path in source_files():
        for prompt, completion in functions(path):
            count = len(completion.strip("\n").splitlines())
            if not MIN_LINES <= count <= MAX_LINES or len(prompt.splitlines()) > MAX_PROMPT_LINES:
                continue
            key = hashlib.sha256((prompt + completion).encode()).hexdigest()
            body = hashlib.sha256("".join(completion.split()).encode()).hexdigest()
            if key in seen or body in seen:
                continue
            seen |= {key, body}
            yield key, {"prompt": prompt, "completion": completion}


def write_atomically(path, rows):
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write into")
    parser.add_argument("--max-train", type=int, default=4000, help="at most this many (4000)")
    parser.add_argument("--max-eval", type=int, default=200, help="at most this many (200)")
    options = parser.parse_args()

    # In the order of the hash: a limit takes a sample of all modules, not the first ones.
    rows = sorted(examples(), key=lambda item: item[0])
    is_eval = [int(key[-8:], 16) < EVAL_SHARE * 2**32 for key, _ in rows]
    evaluation = [row for (_, row), e in zip(rows, is_eval) if e][:options.max_eval]
    train = [row for (_, row), e in zip(rows, is_eval) if not e][:options.max_train]
    if not train or not evaluation:
        sys.exit(f"found {len(rows)} functions with docstrings in {sysconfig.get_paths()['stdlib']}: "
                 "too few. Install the standard library in full (package libpython3-stdlib).")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "train.jsonl", train)
        write_atomically(options.out / "eval.jsonl", evaluation)
    except OSError as error:
        sys.exit(f"{options.out}: cannot write: {error.strerror}")
    print(f"{len(rows)} functions in the standard library of Python {sys.version.split()[0]}: "
          f"{len(train)} to {options.out / 'train.jsonl'}, "
          f"{len(evaluation)} to {options.out / 'eval.jsonl'}")


if __name__ == "__main__":
    main()
