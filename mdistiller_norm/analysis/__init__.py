"""The paper's figures from checkpoints: t-SNE, correlation matrices and softened logits."""
