"""Batches for training."""


class BatchLoader:
    """Iterates forever over float32 batches [batch_size // world_size, 1, R, R] in [-1, 1].

    batch_size is the global batch: each rank takes its own part, and together they take positions start, start + 1, ... of
    the sampler, so that the images do not depend on the number of processes. There is no worker process: a batch is a
    gather from a memory map, far below the time of a training step.
    """

    def __init__(self, tiles, sampler, *, batch_size, start=0, rank=0, world_size=1):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} cannot be cut over {world_size} processes; use a multiple of it"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        if sampler.num_views != tiles.num_views:
            raise ValueError(
                f"the sampler counts {sampler.num_views} views, the tiles {tiles.num_views}"
            )
        self.tiles, self.sampler = tiles, sampler
        self.batch_size, self.start = batch_size, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        local_size = self.batch_size // self.world_size
        position = self.start
        while True:
            yield self.tiles.batch(
                self.sampler.indices(position + self.rank * local_size, local_size)
            )
            position += self.batch_size
