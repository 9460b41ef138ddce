"""What pruning costs in accuracy: every method on every pattern, on two models trained for real.

    python -m bench.pruning digits     a small ResNet that reads handwritten digits, several seeds
    python -m bench.pruning minilm     all-MiniLM-L6-v2, on the retrieval task of the demo
    python -m bench.pruning pareto     accuracy against measured latency, on MiniLM
    python -m bench.pruning report     tables and plots of what has been measured so far

Every figure is written to a journal as soon as it is there; a run that was stopped goes on where
it was.
"""
