"""One rank of a toy line, started by torchrun: writes what it did to `<folder>/calls-<rank>`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import headspring.line.run as line
from headspring.line.registry import Stage
from tests.line import toy

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    line.write_report = lambda run: run / "report.html"

    def train(context):
        """As the toy's, but only the leader writes."""
        if os.environ["RANK"] == "0":
            return toy.train(context)
        toy.calls.append(context.folder.name.removesuffix(".partial"))
        return {}

    stages = {kind: Stage(**{**vars(stage), "run": train}) if stage.training else stage for kind, stage in toy.STAGES.items()}
    done = line.run(folder / "toy.yaml", (), folder / "run", registry=stages)
    (folder / f"calls-{os.environ['RANK']}").write_text(f"{','.join(toy.calls)} {done.leader}")
