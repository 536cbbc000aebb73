"""Networks: backbones, where they are split, metamorphosis modules and heads. Pure PyTorch, no training."""
