"""One file a task: the columns it reads, its training batches and loss, and its metrics."""
