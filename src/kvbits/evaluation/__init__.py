"""The laboratory: what a cache dtype costs in fidelity and answers, and what it brings in sessions and speed."""
