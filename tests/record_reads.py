"The phi4 command with every read of a setting written down: python record_reads.py FILE VERB TARGET [key=value ...]."
import json
import sys
from contextlib import contextmanager

from phi4_ref import cli, config


@contextmanager
def recording():
    "Gathers `Section.field` of each field that the package reads, not counting the checks of `config` itself."
    reads, plain = set(), config.Section.__getattribute__
    def read(self, name):
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if name in type(self).model_fields and reader.startswith("phi4_ref.") and reader != "phi4_ref.config": reads.add(f"{type(self).__name__}.{name}")
        return plain(self, name)
    config.Section.__getattribute__ = read
    try: yield reads
    finally: config.Section.__getattribute__ = plain


if __name__ == "__main__":
    file, sys.argv = sys.argv[1], ["phi4", *sys.argv[2:]]
    cli.keep_memory = lambda: None
    with recording() as reads:
        try: cli.main()
        finally:
            with open(file, "w") as f: json.dump(sorted(reads), f)
