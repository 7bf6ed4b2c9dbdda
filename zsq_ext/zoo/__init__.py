"""Networks, embedded tasks, shipped weights, data readers and checkpoint adapters."""
