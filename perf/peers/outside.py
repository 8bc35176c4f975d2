"""An implementation in another environment, timed by that environment's Python: for packages that cannot share ours.

    python -m perf.run 7b --outside NAME PYTHON FACTORY

FACTORY is a file with make(x, T, H, I, E, K) -> (forward, leaves, weights): forward() -> o or (o, ...), what gradients
are taken of (x first), and (router (E, H), w1 (E, 2*I, H) as [gate | up], w2 (E, H, I)) as the layer uses them, SwiGLU,
softmax over the K kept logits; first_implementation.py is one. The output is checked there with the same code as here,
and timed by the same protocol.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.problem import SEED
from perf.protocol import Settings, Times
from perf.shapes import Shape

CHILD = Path(__file__).with_name("outside_child.py")
TIMEOUT = 900


@dataclass(frozen=True)
class Outside:
    name: str
    python: str
    factory: Path

    def measure(self, shape: Shape, dtype: str, device: str, settings: Settings) -> Any:
        """{"times": {lap: Times}, "error": relative error, "setup_s": of the first call}.

        Raises RuntimeError with the end of its output if it fails or is wrong.
        """
        request = {
            "thiek": shape.thiek,
            "dtype": dtype,
            "device": device,
            "seed": SEED,
            "factory": str(self.factory.resolve()),
            "repeats": settings.repeats,
            "warm_seconds": settings.warm_seconds,
        }
        # Without our path: a package of the same name is looked for in its own environment.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [self.python, str(CHILD), json.dumps(request)],
            cwd=self.factory.resolve().parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode:
            raise RuntimeError(" / ".join(done.stderr.strip().splitlines()[-3:]))
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        answer["times"] = {lap: Times(*t) for lap, t in answer["times"].items()}
        return answer
