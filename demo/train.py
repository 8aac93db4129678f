"""One contender in a process of its own: fine-tune the model, and report every step on stdout.

    loss = cross-entropy + beta * KL(reference || policy), both in nats per token

The reference is the model before the first step. Its logits do not change, so they are computed
once per batch, before the clock starts. What a trainer would otherwise do is unchanged, except
that the penalty is differentiated down to the logits first, on its own, so that its time and
memory can be told from the model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# PYTHONSAFEPATH keeps a script's own folder, where its neighbours are, off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import model as models
import text
from memory import PeakMemory
from report import CONTENDERS, Result

Penalty = Callable[[Tensor, Tensor], Tensor]  # policy and reference [tokens, V] -> nats per token

_MARK = "@demo "  # libraries may print too; what they print carries no mark


def say(kind: str, **content: Any) -> None:
    print(_MARK + json.dumps({"kind": kind, **content}), flush=True)


def heard(line: str) -> dict[str, Any] | None:
    """The driver's side of `say`: the message in a line, or None for any other line."""
    if not line.startswith(_MARK):
        return None
    message: dict[str, Any] = json.loads(line[len(_MARK) :])
    return message


def two_lines(policy: Tensor, reference: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(policy.float(), -1), F.log_softmax(reference.float(), -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def penalty(contender: str) -> Penalty:
    if contender == "eager":
        return two_lines
    if contender == "compile":
        compiled: Penalty = torch.compile(two_lines)
        return compiled
    import fusedkl

    return lambda policy, reference: fusedkl.forward_kl(policy, reference, reduction="mean")


def runs_on(contender: str) -> str:
    if contender != "fusedkl":
        return "torch"
    import fusedkl

    chosen = fusedkl.explain().chosen
    return next(str(b.reason) for b in fusedkl.backends() if b.name == chosen)


def warm_up(kl: Penalty, logits: Tensor) -> float:
    """Seconds of the first call on logits of the real size: compilation, first touch of memory."""
    start = time.perf_counter()
    kl(logits.clone().requires_grad_(), logits).backward()
    return time.perf_counter() - start


def seconds_waited() -> float | None:
    """Seconds that this process's threads were ready to run and had no core, where Linux says."""
    try:
        tasks = [task.read_text().split() for task in Path("/proc/self/task").glob("*/schedstat")]
        return sum(int(waited) for _, waited, _ in tasks) / 1e9
    except (OSError, ValueError):
        return None


def train(arguments: argparse.Namespace) -> Result:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    spec = models.SPECS[arguments.model]
    say("stage", text="loading")
    policy, tokenizer = models.load(spec, arguments.weights)
    data = text.batches(
        text.topics(),
        lambda topic: tokenizer(topic, add_special_tokens=False).input_ids,
        count=min(spec.batches, arguments.steps),
        rows=spec.rows,
        length=spec.length,
        seed=arguments.seed,
        prefix=_prefix(tokenizer),
    )
    say("stage", text="reference")
    with torch.no_grad():
        references = [_logits(policy, batch.inputs) for batch in data]

    say("stage", text="warm-up")
    kl = penalty(arguments.contender)
    result = Result(
        arguments.contender,
        runs_on=runs_on(arguments.contender),
        vocabulary=references[0].shape[-1],
        warm_up_seconds=warm_up(kl, references[0]),
    )

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate(arguments), fused=True)
    loss_seconds, step_seconds, peaks = [], [], []
    start, waited = time.perf_counter(), seconds_waited()
    for step in range(arguments.steps):
        batch, reference = data[step % len(data)], references[step % len(data)]
        step_start = time.perf_counter()
        logits = _logits(policy, batch.inputs)
        leaf = logits.detach().requires_grad_()

        with PeakMemory() as memory:
            loss_start = time.perf_counter()
            divergence = kl(leaf, reference)
            (arguments.beta * divergence).backward()
            loss_seconds.append(time.perf_counter() - loss_start)

        cross_entropy = F.cross_entropy(logits, batch.labels.flatten())
        torch.autograd.backward((cross_entropy, logits), (None, leaf.grad))
        optimizer.step()
        optimizer.zero_grad()
        step_seconds.append(time.perf_counter() - step_start)

        peaks.append(memory.bytes)
        result.memory_method = memory.method
        result.kl.append(divergence.item())
        result.loss.append(cross_entropy.item() + arguments.beta * result.kl[-1])
        say("step", step=step, loss=result.loss[-1], kl=result.kl[-1])

    if waited is not None:
        result.waiting = ((seconds_waited() or 0) - waited) / (time.perf_counter() - start)
    result.loss_seconds = statistics.median(loss_seconds)
    result.step_seconds = statistics.median(step_seconds)
    measured = [peak for peak in peaks if peak is not None]
    result.peak_bytes = max(measured) if measured else None
    return result


def _logits(policy: torch.nn.Module, inputs: Tensor) -> Tensor:
    """[rows, length] token ids -> [rows * length, V] float32 logits."""
    logits: Tensor = policy(inputs, use_cache=False).logits
    return logits.flatten(0, 1)


def _prefix(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it has one."""
    first = tokenizer("a").input_ids[0]
    return [first] if first == tokenizer.bos_token_id else []


def learning_rate(arguments: argparse.Namespace) -> float:
    """The one asked for, or the one that suits the model."""
    if arguments.learning_rate is not None:
        return float(arguments.learning_rate)
    return models.SPECS[arguments.model].learning_rate


def parser() -> argparse.ArgumentParser:
    """The options that the driver hands through, and those that only this script takes."""
    options = training_options()
    options.add_argument("--contender", choices=CONTENDERS, required=True)
    options.add_argument("--weights", type=Path, required=True, help="what demo/model.py printed")
    return options


def training_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description="fine-tune under a KL penalty")
    options.add_argument("--model", choices=models.SPECS, default="smollm2")
    options.add_argument("--steps", type=int, default=16)
    options.add_argument("--beta", type=float, default=1.0, help="weight of the KL penalty")
    options.add_argument("--learning-rate", type=float, help="default: by model")
    options.add_argument("--seed", type=int, default=0, help="of the order of the texts")
    options.add_argument("--threads", type=int, help="default: the cores this process may use")
    return options


if __name__ == "__main__":
    models.offline()
    say("result", **vars(train(parser().parse_args(sys.argv[1:]))))
