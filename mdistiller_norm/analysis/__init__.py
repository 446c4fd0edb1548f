"""The paper's figures from real checkpoints: t-SNE, correlation matrices, softened logits, learning curves.

Each module has a function that computes the numbers and one that draws them.
"""
