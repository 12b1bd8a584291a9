"""Several ranks of the trainer without torchrun: processes that run a list of jobs one after another (gloo)."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.train import open_scores, source_of
from schemas.conversation import templated
from schemas.models import open_tokenizer
from trainer.loop import Run, train
from trainer.ranks import Ranks


def run_job(config, settings, base, ranks):
    tokenizer = templated(open_tokenizer(base, "base"), config.corpus)
    config = config.model_copy(update={"train": settings})
    source = source_of(config, open_scores(config), tokenizer)
    return train(Run(settings, config.context, base, source, tokenizer, ranks))


def work(rank, world, meeting, jobs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for config, settings, base in jobs:
        run_job(config, settings, base, Ranks(rank, world, torch.device("cpu")))
    dist.destroy_process_group()


def on_ranks(world, folder, jobs):
    """Run `jobs`, (config, train settings, base folder) each, on `world` ranks."""
    mp.spawn(work, (world, folder / "meeting", jobs), nprocs=world)
