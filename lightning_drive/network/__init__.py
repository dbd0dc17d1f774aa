"""One torch module: which parameters are prunable, its gradients, its paths, its costs, its weights under masks."""
