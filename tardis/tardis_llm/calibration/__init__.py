"""From text to statistics of every FFN: streamed, in bounded memory, one block at a time."""
