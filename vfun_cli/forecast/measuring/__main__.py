"""The process that measures: a question in a line, its answer in a line, until the input ends.

In: the JSON of a ``Question``. Out: ``{"measured": …}``, or ``{"error": …, "hint": …, "exit_code": …}``.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

from vfun_cli.errors import VfunError
from vfun_cli.forecast.request import Question


def main() -> None:
    """Answer what is asked; nothing else may write into the answers."""
    out, sys.stdout = sys.stdout, sys.stderr
    from vfun_cli.imports import uncollected

    with uncollected():
        from vfun_cli.forecast.measuring.answer import answer
    for line in sys.stdin:
        try:
            found: dict[str, Any] = {"measured": asdict(answer(Question.from_json(json.loads(line))))}
        except VfunError as error:
            found = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
