"""One GPU: everything that happens inside a worker; knows nothing of the cluster."""
