"""Runs in another environment's Python: see outside.py. Needs torch alone, and loads the protocol by its path."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PERF = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def wrong_by(check: ModuleType, x, do, o, weights, k: int) -> float:  # type: ignore[no-untyped-def]
    """The error of o on sampled tokens whose choice of experts is clear."""
    router, w1, w2 = weights
    top, ids = F.linear(x.detach(), router).topk(k + 1, dim=1)
    pairs = check.pairs_of_ids(ids[:, :k], top[:, :k].float().softmax(1))
    truth = check.truth_of(check.Weights(x, do, w1, w2, None, None), swiglu, pairs, backward=False)
    clear = top[truth.tokens, k] < top[truth.tokens, k - 1]
    return check.error(o[truth.tokens[clear]], truth.o[clear])


def main() -> None:
    request = json.loads(sys.argv[1])
    protocol, check = load(PERF / "protocol.py"), load(PERF / "check.py")
    tokens, hidden, inter, experts, k = request["thiek"]
    dtype, device = DTYPES[request["dtype"]], request["device"]
    generator = torch.Generator(device).manual_seed(request["seed"])
    x, do = (torch.randn((tokens, hidden), generator=generator, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    make = load(Path(request["factory"])).make
    forward, leaves, weights = make(x, tokens, hidden, inter, experts, k)

    def output() -> torch.Tensor:
        o = forward()
        return o[0] if isinstance(o, tuple) else o

    def run(lap):  # type: ignore[no-untyped-def]
        o = output()
        lap()
        return torch.autograd.grad(o, leaves, do)

    clock = protocol.clock_of(device)
    case = protocol.Case(run, laps=("forward", "backward"))
    setup = protocol.first_call(case, clock).first_s
    error = wrong_by(check, x, do, output().detach(), [w.detach() for w in weights], k)
    allowed = check.tolerance(dtype, rounded_steps=3)
    if not error <= allowed:
        raise SystemExit(f"its output is wrong: relative error {error:.2e}, allowed {allowed:.1e}")
    settings = protocol.Settings(request["repeats"], request["warm_seconds"], state="settled")
    samples = protocol.measure({"layer": case}, clock, settings)["layer"]
    laps = {"forward": "forward", "backward": "backward", "both": protocol.TOTAL}
    times = {name: samples.times(lap) for name, lap in laps.items()}
    print(json.dumps({"times": times, "error": error, "setup_s": setup}))


if __name__ == "__main__":
    main()
