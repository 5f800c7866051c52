"""The training itself: an ordinary DeepSpeed loop over whole packed rows; the ring is turned on by the engine's config.

Beside the loop stands a row held out to judge by. How an engine comes about (start.py), where text and model come from,
the checkpoint (saving.py), one step to verify (verify.py), and how the output looks are the business of other files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job import Job
from longtext import Row
from reference import alone
from report import Printer, Steps, parts
from saving import LOADED_TOLERANCE, load_back, save

import seqpar_ring as sr


@dataclass
class Run:
    """A job under way on this rank: its packed rows, its engine, and the sequence group that the engine turned on."""

    job: Job
    folder: Path
    tokenizer: Any
    rows: list[Row]
    engine: Any
    sp: sr.SequenceParallel
    out: Printer

    def train(self) -> bool:
        """Train, save, load back. Returns whether the saved model has the trained one's loss."""
        held_out, rows = self.rows[0], self.rows[1:]
        before = self.evaluate(held_out)
        self.sp.reset_report()
        started = time.perf_counter()
        with Steps(self.out, self.job.steps) as steps:
            for micro_batches in self.micro_batches(rows):
                loss = self.step(micro_batches)
                tokens = self.job.seq_len * len(micro_batches) * self.sp.data_size
                steps.done(loss, self.engine.get_global_grad_norm(), tokens)
        seconds, sent = time.perf_counter() - started, self.sp.report()
        after = self.evaluate(held_out)
        save(self)
        loaded = alone(lambda: load_back(self, held_out))
        apart = abs(loaded - after) / after
        self.out.line()
        self.out.table([("sharded", self.sharded())])
        self.out.table(parts(self.sp, self.sp.plan(held_out.lengths), sent, seconds))
        self.out.table(
            [
                ("loss", f"{steps.losses[0]:.4f} at the first step, {steps.losses[-1]:.4f} at the last"),
                ("held out", f"{before:.4f} before training, {after:.4f} after, on a row that was not trained on"),
                ("saved", f"{self.job.output}, loaded in plain transformers on one process: {loaded:.4f} on that row"),
            ]
        )
        same = apart <= LOADED_TOLERANCE[self.engine.module.dtype]
        return self.out.verdict(
            [(same, f"the saved model is the trained one: relative difference {apart:.1e} in loss")]
        )

    def sharded(self) -> str:
        """What is spread over which ranks, and how."""
        over = {
            1: "optimizer states",
            2: "optimizer states and gradients",
            3: "parameters, gradients and optimizer states",
        }
        stage = self.engine.zero_optimization_stage()
        tokens = f"tokens over {self.sp.size} ranks ({self.sp.settings.layout}, each document for itself)"
        return tokens + (f", {over[stage]} over {self.sp.world_size} (ZeRO-{stage})" if stage else "")

    def step(self, micro_batches: list[Row]) -> float:
        """One optimizer step over whole rows, the same on every rank of the sequence group. Returns its mean loss."""
        targets = self.sp.count_targets(row.batch() for row in micro_batches)
        total = 0.0
        for row in micro_batches:
            loss = self.engine(**row.batch(), num_items_in_batch=targets).loss
            self.engine.backward(loss * len(micro_batches))  # the engine divides by their number, and so do the targets
            self.engine.step()
            total += float(loss.detach())
        return total

    def micro_batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """This data rank's rows of each optimizer step; they begin anew when all were seen."""
        count = self.engine.gradient_accumulation_steps()
        for step in range(self.job.steps):
            places = ((step * count + i) * self.sp.data_size + self.sp.data_rank for i in range(count))
            yield [rows[place % len(rows)] for place in places]

    def evaluate(self, row: Row) -> float:
        """The loss of one row over the sequence group, without training."""
        self.engine.eval()
        with torch.no_grad():
            loss = float(self.engine(**row.batch()).loss)
        self.engine.train()
        return loss

    def close(self) -> None:
        """Give up the process groups."""
        dist.destroy_process_group()
